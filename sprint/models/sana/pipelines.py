"""The folders that diffusers opens as `SanaSprintPipeline` and `SanaPipeline`, and the code that uses them."""

import json
from collections.abc import Sequence

from diffusers import (
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from sprint.maths.trigflow import SIGMA_DATA
from sprint.models.encoders import Family
from sprint.models.teacher import DENSE_TIME, SPARSE_TIME

STUDENT, TEACHER = SanaSprintPipeline.__name__, SanaPipeline.__name__
SANA_SHIFT = 3.0  # of the flow times that Sana's sampler walks
DENSE_CONFIG = {"timestep_scale": DENSE_TIME / SPARSE_TIME}


def student_pipeline(family: Family, network: SanaTransformer2DModel) -> SanaSprintPipeline:
    parts = family.tokenizer, family.text_encoder, family.autoencoder, network
    return SanaSprintPipeline(*parts, SCMScheduler(sigma_data=SIGMA_DATA))


def teacher_pipeline(family: Family, network: SanaTransformer2DModel) -> SanaPipeline:
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=SANA_SHIFT
    )
    return SanaPipeline(family.tokenizer, family.text_encoder, family.autoencoder, network, scheduler)


def teacher_usage() -> str:
    return f"Opens in `diffusers.{TEACHER}`."


def student_usage(name: str, size: int, max_length: int, instruction: bool, prompt: str) -> str:
    lines = [
        f"height={size}, width={size}, use_resolution_binning=False,",
        f"max_sequence_length={max_length},",
    ]
    if not instruction:
        lines.append("complex_human_instruction=None,  # trained on bare prompts")
    arguments = "\n".join(f"    {line}" for line in lines)
    return f"""## Sample with diffusers

```python
import torch
from diffusers import SanaSprintPipeline

pipeline = SanaSprintPipeline.from_pretrained({json.dumps(name, ensure_ascii=False)})
settings = dict(
    guidance_scale=4.5,
{arguments}
)
two_steps = pipeline(
    {prompt!r}, num_inference_steps=2, generator=[torch.Generator().manual_seed(0)], **settings
).images[0]
one_step = pipeline(
    {prompt!r}, num_inference_steps=1, intermediate_timesteps=None,
    generator=[torch.Generator().manual_seed(0)], **settings
).images[0]
two_steps.save("two_steps.png")
one_step.save("one_step.png")
```

`intermediate_timesteps=None` is needed for every number of steps but two. One generator a picture, seeded by
itself, gives the pictures of `sprint sample` at the default times.
"""


def times_usage(times: Sequence[float]) -> str:
    """diffusers' pipeline hands its scheduler `timesteps` without their number, which that one asks for (as of
    0.42): the number is bound beforehand.
    """
    steps = len(times) - 1
    return f"""
diffusers takes them so, with `settings` from above:

```python
from functools import partial

pipeline.scheduler.set_timesteps = partial(pipeline.scheduler.set_timesteps, {steps})
picture = pipeline(
    "a red circle", num_inference_steps={steps}, timesteps={[round(t, 4) for t in times]},
    max_timesteps=None, intermediate_timesteps=None,
    generator=[torch.Generator().manual_seed(0)], **settings
).images[0]
```
"""
