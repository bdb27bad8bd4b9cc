"""The toy, as `sprint.models.teacher` asks."""

from sprint.models.teacher import Teacher
from tests.models.toy import blocks as network
from tests.models.toy import encoders, pipelines, positions, ranges
from tests.models.toy import presets as config
from tests.models.toy.costs import FOOTPRINTS
from tests.models.toy.keys import KEYS
from tests.models.toy.layout import lay_out
from tests.models.toy.text_memory import text_memory


class Toy(Teacher):
    title = "Toy"
    network_class = network.ToyTransformer
    keys = KEYS
    footprints = FOOTPRINTS
    presets = tuple(config.PRESETS)
    size_fields = ("depth", "dim")
    heads_field = "heads"
    student_pipeline_class, teacher_pipeline_class = pipelines.STUDENT, pipelines.TEACHER
    dense_config = pipelines.DENSE_CONFIG

    # a config
    preset_config = staticmethod(config.preset_config)
    size_of = staticmethod(config.size_of)
    size_name = staticmethod(config.size_name)
    heads_from = staticmethod(config.heads_from)
    check_config = staticmethod(ranges.check_config)
    config_from_shapes = staticmethod(config.config_from_shapes)
    config_of_size = staticmethod(positions.config_of_size)
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
    tokens = staticmethod(network.tokens)
    time_embedder = staticmethod(network.time_embedder)
    keep_time_in_float32 = staticmethod(network.keep_time_in_float32)
    embed_time = staticmethod(network.embed_time)
    text_memory = staticmethod(text_memory)
    lay_out = staticmethod(lay_out)

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
    teacher_usage = staticmethod(pipelines.teacher_usage)
