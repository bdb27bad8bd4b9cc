"""Networks and what stands round them."""
