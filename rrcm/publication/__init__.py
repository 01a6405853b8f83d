"""Published results: frozen runs beside the working copy, their verification, and the README's tables from them."""
