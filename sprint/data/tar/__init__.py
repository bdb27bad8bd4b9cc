"""Tar files read by place, with an index that is remembered."""
