"""What code may do to the process while it is built or run: each misdeed is named and undone."""

import builtins
import contextlib
import decimal
import gc
import io
import locale
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

import agl_bench.bench.run
from agl_bench.maths.losses import LOSSES
from agl_bench.registry.process import settings
from agl_bench.registry.watch import watched

held = []  # what a plug-in would keep in an attribute


def enter(context):
    context.__enter__()
    held.append(context)


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def replaced(owner, name):
    def stand_in(*args, **kwargs):
        return None

    return lambda: setattr(owner, name, stand_in)


def lower_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))


# what the sentence names -> what is done
FAULTS = {
    "torch's default type": lambda: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "the torch function modes": lambda: enter(Mode()),
    "torch's hooks on saved tensors": lambda: enter(torch.autograd.graph.saved_tensors_hooks(abs, abs)),
    "torch's inference mode": lambda: enter(torch.inference_mode()),
    "torch's gradient mode": lambda: torch.set_grad_enabled(False),
    "torch's anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "torch's autocast": lambda: enter(torch.autocast("cpu", torch.bfloat16)),
    "torch's precision of matrix products": lambda: torch.set_float32_matmul_precision("medium"),
    "torch's deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "torch.backends.mkldnn": lambda: torch.backends.mkldnn.set_flags(False),
    "torch.backends.cuda.enable_flash_sdp": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "torch's flushing of denormal numbers": lambda: torch.set_flush_denormal(True),
    "torch's number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's forward hooks on all modules": lambda: torch.nn.modules.module.register_module_forward_hook(print),
    "torch's pre hooks on all optimisers": lambda: sys.modules[
        "torch.optim.optimizer"
    ].register_optimizer_step_pre_hook(print),
    "torch.nn.Linear.forward": replaced(torch.nn.Linear, "forward"),
    "torch.optim.Adam.step": replaced(torch.optim.Adam, "step"),
    "torch.Tensor.mean": replaced(torch.Tensor, "mean"),  # inherited before
    "torch.nn.functional.linear": replaced(torch.nn.functional, "linear"),
    "torch.manual_seed": replaced(torch, "manual_seed"),
    "numpy.mean": replaced(np, "mean"),
    "builtins.sum": replaced(builtins, "sum"),
    "agl_bench.interfaces.selector.Selector.weighted_mean": replaced(agl_bench.Selector, "weighted_mean"),
    "agl_bench.maths.losses.LOSSES.pearson": lambda: LOSSES.update(pearson=abs),
    "sys.modules['json']": lambda: sys.modules.update(json=sys),
    "Python's random state": lambda: random.seed(1),
    "numpy's random state": lambda: np.random.seed(1),  # noqa: NPY002  (a misdeed)
    "numpy's handling of floating-point errors": lambda: np.seterr(all="raise"),
    "the warnings that are errors": lambda: warnings.simplefilter("error"),
    "the garbage collector": gc.disable,
    "sys.setrecursionlimit": lambda: sys.setrecursionlimit(250),
    "sys.stdout": lambda: setattr(sys, "stdout", sys.stderr),
    "sys.stderr": lambda: setattr(sys, "stderr", io.StringIO()),
    "sys.excepthook": lambda: setattr(sys, "excepthook", print),
    "threading.excepthook": lambda: setattr(threading, "excepthook", print),
    "the descriptor of standard output": lambda: os.close(1),
    "the working directory": lambda: os.chdir("/"),
    "the umask": lambda: os.umask(0o777),
    "the handler of SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "the signals that are blocked": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}),
    "the alarm": lambda: signal.alarm(1000),
    "the limit RLIMIT_NOFILE": lower_limit,
    "the locale": lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
    "decimal's context": lambda: setattr(decimal.getcontext(), "prec", 3),
    "the environment's CUBLAS_WORKSPACE_CONFIG": lambda: os.environ.update(CUBLAS_WORKSPACE_CONFIG=":0:0"),
    "the environment's OMP_NUM_THREADS": lambda: os.environ.update(OMP_NUM_THREADS="77"),
}
HARMLESS = {
    "the filters of warnings": lambda: warnings.simplefilter("ignore"),
    "numpy's print options": lambda: np.set_printoptions(precision=1),
    "torch's print options": lambda: torch.set_printoptions(precision=1),
    "sys.path": lambda: sys.path.insert(0, "/tmp"),
    "logging": lambda: logging.disable(50),
}


def state():
    """Every setting, and what may be replaced."""
    found = {name: setting.get() for name, setting in settings().items()}
    found |= {"linear": torch.nn.Linear.forward, "loss": dict(LOSSES), "sum": sum, "out": sys.stdout}
    return {name: str(value) for name, value in found.items()}


@pytest.mark.parametrize("what", FAULTS)
def test_faults_are_named_and_undone(what):
    with contextlib.redirect_stdout(sys.__stdout__):  # whose descriptor is the process's own
        before = state()
        with watched(is_import=False) as seen:
            FAULTS[what]()
        assert state() == before
    assert seen.changed == [what]
    assert seen.harmless == ([] if what != "the warnings that are errors" else seen.harmless)


@pytest.mark.parametrize("what", HARMLESS)
def test_what_decides_nothing_is_undone_and_told(what):
    before = state()
    with watched(is_import=False) as seen:
        HARMLESS[what]()
    assert state() == before
    assert (seen.changed, seen.harmless) == ([], [what])


def test_nothing_is_said_of_sound_work():
    """Optimisers wrap their `step`, contexts end, and modules are imported."""
    with watched(is_import=False) as seen:
        layer = torch.nn.Linear(2, 2)
        for kind in (torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW):
            optimizer = kind(layer.parameters())
            with torch.autocast("cpu", torch.bfloat16):
                layer(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("error")
        sys.modules.pop("this", None)
        import this  # noqa: F401  (which prints)
    assert (seen.changed, seen.harmless) == ([], [])
    assert seen.printed.startswith("The Zen of Python")


def test_a_library_may_set_itself_up_where_it_is_first_imported(tmp_path, monkeypatch):
    """As scikit-learn does, e.g. in the constructor of a selector; what others depend on is no business of it."""
    monkeypatch.syspath_prepend(tmp_path)
    deeds = "random.random(); os.environ['ITS_OWN'] = '1'; sys.meta_path.append(Finder())"
    (tmp_path / "set_up_x.py").write_text(
        f"import os, random, sys\n\nclass Finder:\n    def find_spec(self, *_):\n        return None\n\n{deeds}\n"
    )
    (tmp_path / "bold_x.py").write_text("import os\n\nos.environ['OMP_NUM_THREADS'] = '77'\n")
    finders, drawn = list(sys.meta_path), random.getstate()
    monkeypatch.setattr(sys, "meta_path", list(finders))
    monkeypatch.setenv("ITS_OWN", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with watched(is_import=False) as seen:
        import set_up_x  # noqa: F401
    assert (seen.changed, seen.harmless) == ([], [])
    assert os.environ["ITS_OWN"] == "1" and len(sys.meta_path) == len(finders) + 1 and random.getstate() == drawn
    with watched(is_import=False) as seen:
        import bold_x  # noqa: F401
    assert seen.changed == ["the environment's OMP_NUM_THREADS"] and os.environ["OMP_NUM_THREADS"] == "1"


def test_an_exception_leaves_nothing_either():
    before = state()
    with pytest.raises(ValueError, match="on purpose"), watched(is_import=False):
        torch.set_default_dtype(torch.float64)
        raise ValueError("on purpose")
    assert state() == before


def test_what_torch_wraps_of_its_own_is_left_to_it():
    """Its compiler, which the first optimiser imports, wraps `manual_seed`; what others wrap is undone and named."""
    code = (
        "import torch\nfrom agl_bench.registry.patches import Patches\n"
        "names = Patches()\nimport torch._dynamo\nassert torch.manual_seed is not torch.random.manual_seed\n"
        "print(names.undo())\nnames = Patches()\n"
        "torch.nn.Linear.forward = torch.no_grad()(torch.nn.Linear.forward)\nprint(names.undo())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[]", "['torch.nn.Linear.forward']"], done.stderr
