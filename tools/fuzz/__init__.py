"""Files that broke or that somebody broke, through every verb that reads them."""
