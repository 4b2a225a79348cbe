"""Makes the five files importable from wherever pytest is started; a toy tree, a checkpoint and a
run of train.py for the tests.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("SHARED_DIR", ROOT.parent / "shared"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: many processes, kills, memory, or minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: python -m pytest --slow"))


def shared(path):
    """A file of third-party data that is not ours to commit; the test is skipped where it is
    absent.
    """
    if not (SHARED / path).exists():
        pytest.skip(f"needs third-party data: {SHARED / path} (set SHARED_DIR)")
    return SHARED / path


@pytest.fixture(autouse=True, scope="session")
def few_validation_samples():
    """A validation of 60 samples instead of 300: no test reads its numbers."""
    import functools

    import train

    whole, train.validate = train.validate, functools.partial(train.validate, samples=60)
    yield
    train.validate = whole


@pytest.fixture(autouse=True, scope="session")
def few_figures():
    """A run draws one of each kind and data set; evaluate.py --task figures draws all."""
    import functools

    import evaluate
    import train

    whole = train.benchmarks_of

    def benchmarks_of(cfg, run):
        benchmarks, draw = whole(cfg, run)
        several = [f for f in draw if f is not evaluate.head_figures]
        return benchmarks, [functools.partial(f, n=1) if f in several else f for f in draw]

    train.benchmarks_of = benchmarks_of
    yield
    train.benchmarks_of = whole


@pytest.fixture(scope="session", autouse=True)
def digests_at_work(request, tmp_path_factory):
    """Where test_digests.train_all() is at work on the second core from the session's start on,
    and its process; None where none of its tests will run.
    """
    if not any(item.path.name == "test_digests.py" for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("digests")
    with open(folder / "errors", "w") as errors:
        command = [sys.executable, str(ROOT / "tests/test_digests.py"), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    yield folder, process
    process.kill()
    process.wait()


@pytest.fixture(scope="session")
def toy_tree(tmp_path_factory):
    """A small ShapesWorld for the whole session."""
    import toy

    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.make_toy(folder, scenes=300)
    return folder


QUICK = ["--size", "tiny", "--workers", "0", "--precision", "fp32"]


def argv(*args):
    """Words of a command line: a text of options, "--steps 20 --warmup 2", is split at blanks, all
    else is one word.
    """
    words = []
    for arg in args:
        is_options = isinstance(arg, str) and arg.startswith("--")
        words += arg.split() if is_options else [str(arg)]
    return words


def run(tmp_path, *args, processes=1, expect=0, timeout=200, **env):
    """train.py from a folder of its own, one thread a process; returns the finished run: stdout,
    stderr, returncode.

    Alone it runs inside this process, which spares a start of Python and torch each time; several
    run under torchrun.
    """
    if processes == 1 and not env:
        done = inside(tmp_path, args)
    else:
        several = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
        start = [sys.executable, *(several if processes > 1 else [])]
        done = subprocess.run(
            [*start, str(ROOT / "train.py"), *argv(*args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
    assert done.returncode == expect or expect is None, done.stderr[-3000:]
    return done


def inside(folder, args, main=None):
    """main(args) of train.py, or of another script, in this process and in this folder."""
    import train

    main = main or train.main

    out, err, code, here, threads = (
        io.StringIO(),
        io.StringIO(),
        0,
        os.getcwd(),
        torch.get_num_threads(),
    )
    os.chdir(folder)
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(argv(*args))
    # as Python ends: a text goes to stderr and the code is 1
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        err.write("" if isinstance(stop.code, int) or stop.code is None else f"{stop.code}\n")
    except Exception:
        code = 1
        traceback.print_exc(file=err)
    finally:
        os.chdir(here)
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def run_and_kill(tmp_path, args, out):
    """train.py until its first checkpoint is there, then kill -9."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv(*args), "--out", out],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (tmp_path / out / "last.pt").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def run_and_stop(tmp_path, args, out):
    """train.py inside this process until its first checkpoint is written, then Ctrl-C."""
    import train

    save = train.save_checkpoint

    def stop(*given):
        save(*given)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", stop)
        return run(tmp_path, *args, "--out", out, expect=1)


def last_line(done):
    return json.loads(done.stdout.strip().splitlines()[-1])


def barely_trained(folder, toy_tree, args):
    """A checkpoint, and what its run printed"""
    done = run(folder, args, "--data", toy_tree, "--out run", *QUICK)
    return folder / "run/last.pt", done


@pytest.fixture(scope="session")
def pretrained(toy_tree, tmp_path_factory):
    """A toy checkpoint to start from"""
    args = "--recipe toy-pretrain --steps 20 --warmup 5 --batch-tokens 512"
    args += " --pretrain mlm+itm+mrfr+mrc+mrckl+wra"
    return barely_trained(tmp_path_factory.mktemp("pretrained"), toy_tree, args)


@pytest.fixture(scope="session")
def albef(toy_tree, tmp_path_factory):
    """The same of ALBEF"""
    args = "--recipe toy-albef --steps 6 --warmup 2 --batch-size 8 --queue 20"
    return barely_trained(tmp_path_factory.mktemp("albef"), toy_tree, args)


def prepared_run(cfg, tokenizer):
    """What train.train() makes of the settings before it loads data."""
    import dataclasses

    import train

    settings = dataclasses.asdict(cfg)
    multitask = cfg.is_multitask
    settings["answer_list"] = (train.all_answers if multitask else train.TASKS[cfg.task].answers)(
        cfg.data
    )
    return train.Run(None, tokenizer, settings, {}, train.vision_of(settings))


def prepare(*words):
    """What train.train() has before its first update: cfg, runtime, run, streams, model,
    optimizers, and the first batch of the first stream.
    """
    from types import SimpleNamespace

    import train

    cfg = train.parse(argv(*words))
    runtime, tokenizer = train.setup_runtime(cfg), train.load_tokenizer(cfg)
    run = prepared_run(cfg, tokenizer)
    streams = train.load_streams(cfg, runtime, run)
    sizes = train.model_sizes(cfg, tokenizer, streams, run.settings["answer_list"])
    model = train.build_model(cfg, runtime, tokenizer, sizes)
    made = {"cfg": cfg, "runtime": runtime, "run": run, "streams": streams, "model": model}
    made |= {"optimizers": train.build_optimizers(cfg, model), "batch": streams.train[0][0]}
    return SimpleNamespace(**made)


def read(reader, tree, splits, **options):
    """All records of a reader, and what it counted."""
    from collections import Counter
    from functools import partial

    from data import records

    stats = Counter()
    return list(records(partial(reader, **options), str(tree), splits, stats)), stats


def batches_of(kind, index, size=1024, name="", place=0, helpers=None, **settings):
    """data.Batches of so many words + regions, of the settings that it asks for."""
    from types import SimpleNamespace

    from data import Batches

    usual = {"seed": 0, "batch_tokens": size, "batch_size": 0, "mask_rate": 0.15, "max_words": 60}
    usual |= {"joint_masking": False, "negatives": 2, "candidates": 0, "mine_every": 0}
    cfg = SimpleNamespace(**usual | {"alternate": False, "augment": ""} | settings)
    return Batches(kind, index, cfg, name, place=place, **helpers or {})


def weights(folder):
    from model import read_checkpoint

    return read_checkpoint(folder / "last.pt").model


def same(a, b, **tolerance):
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], **(tolerance or dict(rtol=0, atol=0)), msg=lambda m: f"{name}: {m}"
        )


def copied(toy_tree, tree, *folders):
    """The tree as links but for these folders, which a test may write into"""
    tree.mkdir(exist_ok=True)
    for path in (path for path in toy_tree.iterdir() if path.name != "index"):
        place = tree / path.name
        if path.name not in folders and not place.exists():
            place.symlink_to(path)
        elif path.name in folders and (place.is_symlink() or not place.exists()):
            place.unlink(missing_ok=True)
            shutil.copytree(path, place)
    return tree


def ids_of(store):
    """The names of a store's images."""
    return [store.image_id(i) for i in range(len(store))]
