"""The expression that it is shown is part of a larger tensor, which it looks at."""

from agl_bench import Selector, hookimpl


class PeeksAtValidation(Selector):
    """The expression that it is shown is part of a larger tensor, which it looks at."""

    reference = "a broken plug-in"

    def __init__(self, view):
        super().__init__(view)
        seen = view.expression
        seen = seen if seen._base is None else seen._base
        self.register_buffer("weights", (seen - seen.mean(0)).square().mean(0).nan_to_num(0.5).clamp(1e-3, 1))

    def forward(self, losses, step):
        return self.weighted_mean(losses, self.weights)


@hookimpl
def register_selectors():
    return {"broken": PeeksAtValidation}
