"""Sana and SANA-Sprint, as `sprint.models.teacher` asks."""

from diffusers import SanaTransformer2DModel

from sprint.models.sana import blocks as network
from sprint.models.sana import encoders, pipelines, positions, ranges
from sprint.models.sana import presets as config
from sprint.models.sana.costs import FOOTPRINTS
from sprint.models.sana.keys import KEYS
from sprint.models.sana.layout import lay_channels_last
from sprint.models.sana.text_memory import SanaTextMemory
from sprint.models.teacher import Teacher


class Sana(Teacher):
    title = "Sana"
    network_class = SanaTransformer2DModel
    keys = KEYS
    footprints = FOOTPRINTS
    presets = tuple(config.PRESETS)
    size_fields = ("num_layers", "num_attention_heads", "attention_head_dim")
    heads_field = "num_cross_attention_heads"
    student_pipeline_class, teacher_pipeline_class = pipelines.STUDENT, pipelines.TEACHER
    dense_config = pipelines.DENSE_CONFIG

    # a config
    preset_config = staticmethod(config.transformer_config)
    size_of = staticmethod(config.size_of)
    size_name = staticmethod(config.size_name)
    heads_from = staticmethod(config.heads_from)
    check_config = staticmethod(ranges.check_config)
    config_from_shapes = staticmethod(config.config_of)
    config_of_size = staticmethod(positions.config_of_size)
    told_by_extras = staticmethod(positions.told_by_extras)
    sizes = staticmethod(config.sizes)
    is_student = staticmethod(config.is_student)
    has_qk_norm = staticmethod(config.has_qk_norm)
    adapted_config = staticmethod(config.adapted_config)
    student_config = staticmethod(config.student_config)
    with_depth = staticmethod(config.with_depth)
    meta_network = staticmethod(config.meta_network)
    time_clues = staticmethod(config.time_clues)

    # a network
    velocity = staticmethod(network.velocity)
    blocks = staticmethod(network.blocks)
    output_projections = staticmethod(network.output_projections)
    only_first = staticmethod(network.only_first)
    time_embedder = staticmethod(network.time_embedder)
    keep_time_in_float32 = staticmethod(network.keep_time_in_float32)
    embed_time = staticmethod(network.embed_time)
    text_memory = SanaTextMemory
    lay_out = staticmethod(lay_channels_last)

    # adapted teacher and student
    qk = staticmethod(network.qk)
    time_mlp = staticmethod(network.time_mlp)
    student_of = staticmethod(network.student_of)

    # folders
    load_encoders = staticmethod(encoders.load_encoders)
    downscale = staticmethod(encoders.downscale)
    student_pipeline = staticmethod(pipelines.student_pipeline)
    teacher_pipeline = staticmethod(pipelines.teacher_pipeline)
    student_usage = staticmethod(pipelines.student_usage)
    times_usage = staticmethod(pipelines.times_usage)
    teacher_usage = staticmethod(pipelines.teacher_usage)
