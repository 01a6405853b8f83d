"""Published results: freezing runs, fetching and verifying them, and the README's table, which is made from them."""
