"""Programs with data and, beside each, its posterior by a formula of its own; ``zoo`` makes the table of them."""
