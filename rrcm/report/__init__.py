"""report: tables, figures and the report made of them."""
