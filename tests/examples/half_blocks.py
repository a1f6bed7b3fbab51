import moonshot as ms


class HalfBlocks(ms.GraphAdapter):
    """A Llama's attention and MLP as parts of their own: the MLP's inputs come from the pruned attention beside it."""

    def parts(self, model, run):
        return [
            (f"model.layers.{k}.{half}", getattr(block, half))
            for k, block in enumerate(model.model.layers)
            for half in ("self_attn", "mlp")
        ]
