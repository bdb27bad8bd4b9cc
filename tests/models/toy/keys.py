"""Names of the toy's tensors: an original layout that fuses q, k, v, and the network's own."""

from sprint.models.teacher import KeyTable, Stack

KEYS = KeyTable(
    rows=(
        ("net.input", "stem"),
        ("net.positions", "places"),
        ("net.text", "reader"),
        ("net.time.0", "clock.first"),
        ("net.time.1", "clock.second"),
        ("net.guidance.0", "clock.strength.first"),
        ("net.guidance.1", "clock.strength.second"),
        ("net.output", "leaf"),
    ),
    stacks=(
        Stack(
            "net.layer",
            "layers",
            (
                ("qkv", "query", "key", "value"),
                ("q_rms", "norm_q"),
                ("k_rms", "norm_k"),
                ("proj", "out"),
                ("adaln", "told"),
                ("fc1", "up"),
                ("fc2", "down"),
            ),
        ),
    ),
    extras={"net.null_text": (None, "text_width")},
    needed=("stem.weight", "reader.weight", "places", "layers.0.query.weight"),
)
