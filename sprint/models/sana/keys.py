"""Names of Sana's tensors: the public trainer's layout and diffusers'."""

from sprint.models.teacher import KeyTable, Stack

NETWORK = (
    # original                        diffusers
    ("x_embedder.proj", "patch_embed.proj"),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    ("attention_y_norm", "caption_norm"),
    # a teacher
    ("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
    # a student, which embeds guidance too
    ("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    ("cfg_embedder.mlp.0", "time_embed.guidance_embedder.linear_1"),
    ("cfg_embedder.mlp.2", "time_embed.guidance_embedder.linear_2"),
    ("t_block.1", "time_embed.linear"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.scale_shift_table", "scale_shift_table"),
)
BLOCK = (
    # blocks.i. …                     transformer_blocks.i. …
    ("scale_shift_table", "scale_shift_table"),
    ("attn.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
    ("attn.q_norm", "attn1.norm_q"),
    ("attn.k_norm", "attn1.norm_k"),
    ("attn.proj", "attn1.to_out.0"),
    ("cross_attn.q_linear", "attn2.to_q"),
    ("cross_attn.kv_linear", "attn2.to_k", "attn2.to_v"),
    ("cross_attn.q_norm", "attn2.norm_q"),
    ("cross_attn.k_norm", "attn2.norm_k"),
    ("cross_attn.proj", "attn2.to_out.0"),
    ("mlp.inverted_conv.conv", "ff.conv_inverted"),
    ("mlp.depth_conv.conv", "ff.conv_depth"),
    ("mlp.point_conv.conv", "ff.conv_point"),
)
KEYS = KeyTable(
    rows=NETWORK,
    stacks=(Stack("blocks", "transformer_blocks", BLOCK),),
    extras={"y_embedder.y_embedding": (None, "text_width"), "pos_embed": (1, None, "width")},
    needed=(
        "patch_embed.proj.weight",
        "proj_out.weight",
        "caption_projection.linear_1.weight",
        "transformer_blocks.0.ff.conv_inverted.weight",
    ),
)
