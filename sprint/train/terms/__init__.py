"""What stage 2 adds up, to be held line by line against Algorithm 1 of SANA-Sprint (arXiv 2503.09641).

x_t = cos t · x_0 + sin t · σ_d ε, t in [0, π/2], x_0 = σ_d · latent; networks see x̂ = x_t / σ_d.

student   F_θ: (x_hat, t, text, mask, guidance) -> F [B, C, H, W], logvar [B]
teacher   F_T, the frozen adapted teacher: (x_hat, t, text, mask) -> F
tapped    its features: (x_hat, t, text, mask) -> one [B, N, D] for each tapped block
heads     the discriminator on them: (features, samples in a group) -> logits [B, L]
clock     on which each term marks its parts

A term takes a batch, or a part of one, with its draws, and gives its loss, a scalar, and scalars to be logged.
"""

from torch import Tensor

Logged = dict[str, Tensor]
