"""How far runs of one recipe lie apart."""
