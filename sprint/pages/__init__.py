"""How any page is set: HTML, charts, grids of pictures, PNG files."""
