"""``clipmill pretrain METHOD [RECIPE]``: train a method on a packed data set.

Every option of the method, of training and of loading is a flag whose default comes from the recipe, or from the run
that ``--config run.json`` names. The run folder gets run.json, log, checkpoints, samples/ and the encoder.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from clipmill.pipeline.config import TrainConfig, from_json, to_json
from clipmill.tools.data_set import DataSet, full_name
from clipmill.tools.simulate import WhatIf

if TYPE_CHECKING:
    from collections.abc import Callable

    from clipmill.models.method import Method
    from clipmill.pipeline.record import ShardIndex
    from clipmill.pipeline.ring import LoaderConfig

    Probe = Callable[[], dict[str, float]]

RUN_FILE = "run.json"
DEFAULT_RECIPE = "tiny"
SAMPLES = 8  # clips in the pictures
_FREE = frozenset(
    {"device", "channels_last", "compile", "log_every", "checkpoint_every", "keep", "tensorboard"}
)  # training options that a resumed run may change
_USAGE = """usage: clipmill pretrain METHOD [RECIPE] --data FOLDER --out RUN [OPTIONS]
       clipmill pretrain --config RUN/run.json --data FOLDER --out RUN [OPTIONS]

Train METHOD on a packed data set, with the settings of RECIPE (default: {default}). Every setting is an option:
`clipmill pretrain METHOD RECIPE --help` lists them; `clipmill methods` lists methods and recipes.

methods: {methods}

With several processes: torchrun --nproc-per-node 8 -m clipmill.tools.cli pretrain METHOD ..."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is not a setting of the method, of training or of loading."""

    data: DataSet
    """Folder made by `clipmill pack`, or the URL of one (s3://bucket/set, https://host/set, ...)."""
    out: Path
    """Folder of the run; must be new unless --resume."""
    cache_dir: Path | None = None
    """Folder for what is fetched of a data set at a URL; default $CLIPMILL_CACHE, else ~/.cache/clipmill."""
    split: str = ""
    """Records to train on; default: the split `train` where there is one, else all."""
    resume: bool = False
    """Continue from the newest checkpoint in --out, or begin if there is none."""
    plan: bool = False
    """Print steps, bytes, memory and the rate to expect (after a few steps to measure it), and do not train."""
    what_if: WhatIf = field(default_factory=WhatIf)
    """Hardware that --plan forecasts the rate of a process for."""
    probe: str = ""
    """davis:N or otb:N: log the encoder's score on the first N sequences of --probe-data, at the published settings."""
    probe_data: Path | None = None
    """Folder of the DAVIS or OTB corpus, for --probe."""
    probe_every: int = 10
    """Epochs between probes; the last epoch always has one."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """A resolved command line. config: an instance of the method's Config."""

    method: str
    recipe: str
    options: Options
    config: Any
    train: TrainConfig
    loader: LoaderConfig


def parse(argv: Sequence[str]) -> Args:
    """Read a command line; an unknown method, recipe or option names near ones."""
    # Idle worker threads of torch must sleep, not spin: they share the cores with the decode threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported, which is later
    import tyro

    rest = list(argv)
    names = [rest.pop(0) for _ in range(2) if rest and not rest[0].startswith("-")]
    source = _take_config(rest)
    if not names and source is None:
        _explain(rest)
    from clipmill.models.method import method_class

    if source is None:
        method, recipe = names[0], names[1] if len(names) > 1 else DEFAULT_RECIPE
        defaults = _recipe_defaults(method, recipe)
    else:
        method, recipe, defaults = _replayed(source, names)
    shape = _command_line(method_class(method).Config, *defaults)
    flags: Any = tyro.cli(shape, prog=" ".join(["clipmill pretrain", method, recipe]).strip(), args=rest)
    options = Options(**{name: getattr(flags, name) for name in Options.__dataclass_fields__})
    return Args(
        method=method,
        recipe=recipe,
        options=options,
        config=flags.method_options,
        train=flags.train_options,
        loader=flags.loader_options,
    )


def _take_config(rest: list[str]) -> Path | None:
    """Remove ``--config FILE`` from a command line."""
    for number, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name == "--config":
            if not equals and number + 1 == len(rest):
                raise ValueError("--config needs a file; give the run.json of an earlier run")
            value = value if equals else rest.pop(number + 1)
            del rest[number]
            return Path(value)
    return None


def _explain(rest: list[str]) -> None:
    from clipmill.models.method import method_names

    if rest and rest[0] not in ("-h", "--help"):
        raise ValueError(f"pretrain needs a METHOD before {rest[0]}: {', '.join(method_names())}")
    usage = _USAGE.format(default=DEFAULT_RECIPE, methods=", ".join(method_names()))
    print(usage, file=sys.stdout if rest else sys.stderr)
    raise SystemExit(0 if rest else 2)


def _recipe_defaults(method: str, recipe: str) -> tuple[Any, TrainConfig, LoaderConfig]:
    from difflib import get_close_matches

    from clipmill.models.method import recipes
    from clipmill.pipeline.ring import LoaderConfig

    known = recipes(method)
    if recipe not in known:
        near = get_close_matches(recipe, known, n=3) or known
        raise ValueError(f"method {method} has no recipe {recipe!r}; did you mean {', '.join(near)}?")
    return known[recipe].method, TrainConfig(**known[recipe].train), LoaderConfig()


def _replayed(path: Path, names: list[str]) -> tuple[str, str, tuple[Any, TrainConfig, LoaderConfig]]:
    """Method, recipe name and settings of a run.json."""
    from clipmill.models.method import method_class
    from clipmill.pipeline.ring import LoaderConfig

    data = read_run_file(path)
    method, recipe = str(data["method"]), str(data.get("recipe", ""))
    if names and names[:1] != [method]:
        raise ValueError(f"{path} is a run of {method}, not of {names[0]}; leave METHOD out")
    if len(names) > 1:
        raise ValueError(f"{path} and recipe {names[1]} both set the defaults; give one of them")
    config = from_json(method_class(method).Config, data["config"], f"{path}: config")
    train = from_json(TrainConfig, data["train"], f"{path}: train")
    return method, recipe, (config, train, from_json(LoaderConfig, data["loader"], f"{path}: loader"))


def _command_line(kind: type, config: Any, train: TrainConfig, loader: LoaderConfig) -> type:
    """A dataclass with `Options` and all settings as flat flags."""
    import tyro

    flat = tyro.conf.arg(name="")
    return make_dataclass(
        "Pretrain",
        [
            ("method_options", Annotated[kind, flat], field(default=config)),
            ("train_options", Annotated[TrainConfig, flat], field(default=train)),
            ("loader_options", Annotated[type(loader), flat], field(default=loader)),
        ],
        bases=(Options,),
        frozen=True,
        kw_only=True,
    )


# --- the run folder -----------------------------------------------------------------------------------------


def read_run_file(path: Path) -> dict[str, Any]:
    """A ``run.json``; raises ValueError if it is not one."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a run.json ({error})") from error
    missing = [name for name in ("method", "config", "train", "loader") if name not in data]
    if missing:
        raise ValueError(f"{path}: not a run.json; it has no {missing[0]!r}")
    return data


def run_file(args: Args, index: ShardIndex, split: str) -> dict[str, Any]:
    """The content of ``run.json``: everything that is needed to run again."""
    return {
        "method": args.method,
        "recipe": args.recipe,
        "config": to_json(args.config),
        "train": to_json(args.train),
        "loader": to_json(args.loader),
        "data": full_name(args.options.data),
        "split": split,
        "data_digest": index.digest,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("clipmill", "torch", "torchvision", "av", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "?"
    return found


def claim(folder: Path, content: dict[str, Any], resume: bool) -> None:
    """Make ``folder`` the folder of this run; raises ValueError if it belongs to another one."""
    path = folder / RUN_FILE
    if path.exists():
        if not resume:
            raise ValueError(f"{folder} holds a run already; add --resume to continue it, or choose another --out")
        _check_same(path, read_run_file(path), content)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{RUN_FILE}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    partial.replace(path)


def _check_same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in ("method", "config", "train", "split", "data_digest"):
        old, new = before.get(name), now[name]
        if isinstance(new, dict) and isinstance(old, dict):
            changed = [key for key in new if old.get(key, new[key]) != new[key] and key not in _FREE]
            if changed:
                key = changed[0]
                raise ValueError(
                    f"{path} has {key} = {old.get(key)}, this command {new[key]}; resume with the same settings "
                    f"(--config {path}) or choose another --out"
                )
        elif old != new:
            raise ValueError(f"{path} has {name} = {old}, this command {new}; choose another --out")


def records_of(data: Path, split: str) -> tuple[ShardIndex, str]:
    """The records to train on, and the split they are of (empty: all)."""
    from clipmill.pipeline.record import ShardIndex

    index = ShardIndex.open(data)
    if not split and "train" in set(index.column("split").tolist()):
        split = "train"
    return (index.split(split) if split else index), split


# --- the command --------------------------------------------------------------------------------------------


def main(args: Args) -> int:
    """Train; 0 when the run is complete, 128 + signal when it was stopped early (and can be resumed)."""
    import torch

    from clipmill.models.method import method_class
    from clipmill.pipeline import dist
    from clipmill.pipeline.remote import data_folder

    index, split = records_of(data_folder(args.options.data, cache_dir=args.options.cache_dir), args.options.split)
    torch.manual_seed(args.train.seed)
    method = method_class(args.method)(args.config)
    if args.options.plan:
        from clipmill.tools.pretrain_plan import plan_lines

        print(f"{args.method}, recipe {args.recipe or '-'}")
        print("\n".join(plan_lines(method, index, args.train, args.loader, args.options.what_if)))
        return 0
    probe = _probe(args.options, method)
    try:
        return _run(args, method, index, split, probe)
    finally:
        dist.teardown()


def _probe(options: Options, method: Method) -> Probe | None:
    if not options.probe:
        return None
    if options.probe_data is None or options.probe_every < 1:
        raise ValueError("--probe needs the folder of its corpus (--probe-data) and --probe-every of at least 1")
    from clipmill.tools.evaluate.probe import open_probe

    return open_probe(options.probe, options.probe_data, method.encoder)


def _run(args: Args, method: Method, index: ShardIndex, split: str, probe: Probe | None) -> int:
    from clipmill.models.encoder import save_encoder
    from clipmill.pipeline import dist
    from clipmill.pipeline.train import train

    out = args.options.out
    dist.setup(args.train.device)
    problem = None
    if dist.is_main():
        try:
            claim(out, run_file(args, index, split), args.options.resume)
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem := dist.gather_objects(problem)[0]:  # all processes stop, each with the reason
        raise ValueError(problem)
    if dist.is_main():
        where = f"{len(index)} records" + (f" of split {split}" if split else "")
        print(f"{args.method}, recipe {args.recipe or '-'}: {where}, {args.train.epochs} epochs, run folder {out}")
        save_samples(method, index, args)
    result = train(
        method,
        index,
        args.train,
        out,
        loader=args.loader,
        resume=args.options.resume,
        probe=probe,
        probe_every=args.options.probe_every,
    )
    if result.signal:
        if dist.is_main():
            print(f"stopped at step {result.step} of {result.total}; the same command with --resume continues")
        return 128 + result.signal
    if dist.is_main():
        for name, encoder in method.encoders().items():
            folder = out if encoder is method.encoder else out / name
            save_encoder(encoder, folder, {"method": args.method, "recipe": args.recipe, "step": result.step})
        print(f"{result.total} steps done; encoder in {out}")
    dist.barrier()
    return 0


def save_samples(method: Method, index: ShardIndex, args: Args) -> None:
    """Pictures of the first samples of the first batch, one PNG per view, in ``samples/``."""
    from dataclasses import replace

    from PIL import Image

    from clipmill.pipeline.loader import Loader
    from clipmill.pipeline.spec import VideoSpec
    from clipmill.tools import pictures

    folder = args.options.out / "samples"
    planner = method.plan()
    if all((folder / f"{view.name}.png").exists() for view in planner.views):
        return
    count = min(SAMPLES, args.train.batch_size, len(index))
    config = replace(args.loader, threads=1, processes=0)
    options: Any = {"batch_size": count, "seed": args.train.seed, "repeat": args.train.repeat, "drop_last": False}
    with Loader(index, planner, config=config, **options) as loader:
        batch = next(iter(loader.epoch(0)))
    keys = [loader.index[number].key for number in batch.index.tolist()]
    folder.mkdir(exist_ok=True)
    for view in planner.views:
        rows = []
        for row, key in enumerate(keys):
            if isinstance(view.augment, VideoSpec):
                picture = pictures.clip_strip(batch.video[view.name][row].numpy(), view.augment)
            elif view.augment.logmel is not None:
                picture = pictures.mel_picture(batch.audio[view.name][row, 0].numpy())
            else:
                picture = pictures.wave_picture(batch.audio[view.name][row].numpy())
            rows.append((key, picture))
        target = folder / f"{view.name}.png"
        partial = target.with_name(f"{view.name}.partial.png")
        Image.fromarray(pictures.contact_sheet(rows)).save(partial)
        os.replace(partial, target)
