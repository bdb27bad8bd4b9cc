"""The evening before: a whole distillation at its real size, with weights that mean nothing."""
