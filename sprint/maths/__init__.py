"""The papers as functions of tensors: TrigFlow, schedules, losses, samplers, dual numbers."""
