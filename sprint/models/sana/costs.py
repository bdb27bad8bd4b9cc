"""What an update of a Sana holds, for the plan.

The sizes of a block are measured ones: bytes of live tensors, on small networks on a CPU
(`python -m tools.bench.memory` counts whole updates the same way, and compares).
"""

from sprint.models.teacher import Footprint
from sprint.recipe.schema import Precision

FOOTPRINTS = {
    Precision.fp32: Footprint(
        block=177,
        block_text=16,
        ends=12.5,
        ends_text=24,
        frozen_block=137,
        frozen_ends=4,
        head=20,
        tangent=54,
        recomputed_tangent=106,
        no_grad=56,
        backward=9,
        frozen_backward=20,
    ),
    Precision.bf16: Footprint(
        block=124.5,
        block_text=18,
        ends=2.5,
        ends_text=16,
        frozen_block=85,
        frozen_ends=2,
        head=10,
        tangent=31,
        recomputed_tangent=57,
        no_grad=34,
        backward=10,
        frozen_backward=10,
    ),
}
