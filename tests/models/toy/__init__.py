"""A second family, as unlike Sana as a small one can be: what the seam must bear.

Pictures and texts go through the same attention, blocks give a pair, the clock runs backwards and the sign is
turned, latents and texts are of other sizes, and its folders are not written by diffusers.
"""
