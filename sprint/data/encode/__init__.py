"""What makes those shards: a teacher's text encoder and autoencoder over samples."""
