"""What a model is worth: figures, pages, comparisons, searches."""
