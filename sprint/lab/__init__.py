"""The built-in world that runs on a laptop: captioned scenes, a reader of them, its own small networks."""
