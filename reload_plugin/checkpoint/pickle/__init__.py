"""Reading pickles without running what is in them."""
