"""What an update of a Sana holds, for the plan.

The sizes of a block are measured ones: bytes of live tensors, on small networks on a CPU
(`python -m tools.bench.memory` counts whole updates the same way, and compares).
"""

from sprint.models.teacher import Footprint
from sprint.recipe.schema import Precision

FOOTPRINTS = {
    Precision.fp32: Footprint(177, 16, 12.5, 24, 137, 4, 20, 54, 106, 56, 9, 20),
    Precision.bf16: Footprint(124.5, 18, 2.5, 16, 85, 2, 10, 31, 57, 34, 10, 10),
}
