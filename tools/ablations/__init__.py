"""The paper's ablations on the tiny family, beside the paper."""
