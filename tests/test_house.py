"""Rules of the house: who may import whom, the options' prefix, and that the README tells the truth."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from fairseq_runs import PLUGIN, ROOT

from fairseq_codistill.config import CodistillConfig

# Each room, and what of the house it may import: arrows point downwards only.
LAYERS = {
    "common.fairseq_log": set(),
    "common.output": set(),
    "common.paths": set(),
    "common.version": set(),
    "exchange.manifest": set(),
    "exchange.run": {"exchange.manifest"},
    "exchange.liveness": {"exchange.manifest"},
    "exchange.membership": {"exchange.manifest", "exchange.liveness", "exchange.run", "exchange.stores"},
    "exchange.structure": {"exchange.manifest"},
    "exchange.snapshot": {"exchange.manifest"},
    "exchange.lock_file": set(),
    "exchange.directory_store": {"exchange.lock_file", "exchange.manifest"},
    "exchange.stores": {"exchange.directory_store", "exchange.lock_file", "exchange.manifest", "exchange.url_store"},
    "exchange.url_store": {"exchange.manifest"},
    "exchange.exchange": {
        "exchange.manifest", "exchange.membership", "exchange.liveness", "exchange.run", "exchange.snapshot",
        "exchange.stores", "exchange.structure",
    },  # fmt: skip
    "exchange.status": {"exchange.manifest", "exchange.run", "exchange.stores"},
    "exchange.worker": set(),
    "exchange.background": {
        "exchange.exchange", "exchange.manifest", "exchange.snapshot", "exchange.status", "exchange.worker",
    },
    "core.guard": set(),
    "core.gate": set(),
    "core.rdrop": set(),
    "core.losses": {"core.gate", "core.guard"},
    "core.schedules": set(),
    "core.topology": set(),
    "core.weight_decay": set(),
    "core.int8": set(),
    "core.replica": {"core.int8"},
    "core.fused": {"core.gate", "core.guard", "core.losses", "core.output_layer", "core.rdrop"},
    "core.output_layer": set(),
    "core.group": set(),
    "core.barrier": {"core.group", "exchange.background", "exchange.exchange", "exchange.manifest"},
    "core.teaching": {"core.schedules"},
    "core.codistiller": {
        "core.barrier", "core.group", "core.int8", "core.replica", "core.schedules", "core.teaching",
        "core.topology", "exchange.background", "exchange.exchange", "exchange.manifest", "exchange.snapshot",
        "exchange.structure", "exchange.worker",
    },  # fmt: skip
    "launch.hydra": set(),
    "launch.command": {"launch.hydra"},
    "launch.checks": {"common.paths", "launch.command"},
    "launch.outputs": {"launch.command"},
    "launch.plan": {"launch.checks", "launch.command", "launch.outputs"},
    "launch.checkpoint": set(),
    "launch.guard": set(),
    "launch.progress": {"common.fairseq_log"},
    "launch.error": {"launch.progress"},
    "launch.peer": {"launch.guard", "launch.plan", "launch.progress"},
    "launch.view": {"launch.peer", "launch.plan"},
    "launch.supervisor": {
        "common.output", "launch.checkpoint", "launch.error", "launch.guard", "launch.peer",
        "launch.plan", "launch.view",
    },  # fmt: skip
    "launch.cost": {"core.topology", "launch.view"},
    "launch.preview": {"exchange.status", "exchange.stores", "launch.cost", "launch.plan", "launch.view"},
    "launch.slurm": {"launch.checkpoint", "launch.command", "launch.outputs", "launch.plan"},
    "launch.status": {"common.output", "exchange.manifest", "exchange.status", "exchange.stores", "launch.view"},
    "launch.export": {"checkpoints", "common.output", "common.paths", "launch.view"},
    "launch.main": {
        "common.output", "common.paths", "common.version", "launch.export", "launch.plan", "launch.preview", "launch.status",
        "launch.supervisor", "launch.view",
    },  # fmt: skip
    "launch.__main__": {"launch.main"},
    "report.log": {"common.fairseq_log"},
    "report.curves": {"report.log"},
    "report.summary": {"common.fairseq_log", "report.log"},
    "report.advice": {"report.curves", "report.log", "report.summary"},
    "report.notes": {"common.fairseq_log", "report.log", "report.summary"},
    "report.significance": {"report.files", "report.summary"},
    "report.table": {"common.fairseq_log", "report.notes", "report.significance", "report.summary"},
    "report.figure": {
        "common.fairseq_log", "report.curves", "report.log", "report.notes", "report.summary", "report.table",
    },  # fmt: skip
    "report.files": {"common.paths", "report.log", "report.notes", "report.summary"},
    "report.main": {
        "common.output", "common.paths", "common.version", "report.advice", "report.figure", "report.files", "report.notes",
        "report.significance", "report.summary", "report.table",
    },  # fmt: skip
    "report.__main__": {"report.main"},
    "image.transforms": {"compat"},
    "image.options": {"image.transforms"},
    "image.folder": {"common.paths", "compat", "image.transforms"},
    "image.models": {"compat"},
    "image.lr_schedules": {"core.weight_decay"},
    "image.nesterov": set(),
    "image.task": {"compat", "image.folder", "image.lr_schedules", "image.options", "image.transforms"},
    "image.predict": {"common.paths", "compat", "image.folder", "image.models", "image.task"},
    "compat": set(),
    "checkpoints": {"compat"},
    "wrapping": set(),
    "ending": set(),
    "data_order": {"core.schedules", "core.weight_decay", "wrapping"},
    "facts": set(),
    "hook": {"core.codistiller", "core.teaching", "ending", "exchange.run", "facts", "wrapping"},
    "config": {"common.paths", "core.gate", "core.losses", "core.schedules", "core.topology"},
    "build": {
        "config", "core.codistiller", "core.losses", "core.schedules", "core.topology", "data_order", "exchange.exchange",
        "exchange.run", "exchange.stores", "ema", "hook", "stalled", "teachers",
    },  # fmt: skip
    "metrics": set(),
    "probe": {"core.output_layer", "core.teaching", "teachers"},
    "criterion": {
        "build", "config", "core.fused", "core.gate", "core.guard", "core.losses", "core.output_layer", "core.rdrop",
        "core.teaching", "hook", "metrics", "probe",
    },  # fmt: skip
    "ema": {"core.codistiller", "wrapping"},
    "stalled": {"core.codistiller", "core.group", "core.schedules", "wrapping"},
    "teachers": {"core.output_layer"},
    "plugin": {"compat", "criterion", "image.lr_schedules", "image.models", "image.nesterov", "image.task"},
    "registration": set(),
    "__init__": {"common.version", "registration"},
    "image_predict": {"image.predict"},
}
# Which libraries a room may know of, where that is a rule; the commands must start without fairseq and torch.
FOREIGN = {
    "__init__": set(),
    "common.paths": set(),
    "config": {"fairseq", "omegaconf"},
    "core.codistiller": {"torch"},
    "core.fused": {"torch"},
    "core.gate": {"torch"},
    "core.group": {"torch"},
    "core.guard": {"torch"},
    "core.int8": {"torch"},
    "core.losses": {"torch"},
    "core.output_layer": {"torch"},
    "core.rdrop": {"torch"},
    "core.replica": {"torch"},
    "core.schedules": set(),
    "core.teaching": {"torch"},
    "core.topology": set(),
    "core.weight_decay": set(),
    "data_order": set(),
    "ending": set(),
    "exchange.background": {"torch"},
    "exchange.directory_store": set(),
    "exchange.exchange": set(),
    "exchange.lock_file": set(),
    "exchange.manifest": set(),
    "exchange.membership": set(),
    "exchange.liveness": set(),
    "exchange.run": set(),
    "exchange.snapshot": {"safetensors", "torch"},
    "exchange.stores": set(),
    "exchange.structure": set(),
    "exchange.url_store": {"fsspec"},
    "exchange.worker": set(),
    "facts": set(),
    "hook": set(),
    "registration": set(),
    "wrapping": set(),
}
LIBRARIES = {"torch", "fairseq", "safetensors", "omegaconf", "numpy", "matplotlib", "rich", "fsspec", "hydra"}


# Folders that know nothing of fairseq: it is the plugin alone (the package's own modules, and image/) that does.
WITHOUT_FAIRSEQ = ("common", "core", "exchange", "launch", "report")
# Which folders a folder may import; "" is the plugin.
FOLDERS = {
    "common": set(),
    "exchange": set(),
    "core": {"exchange"},
    "launch": {"", "common", "core", "exchange"},  # of the plugin only checkpoints, see LAYERS, and only when it exports
    "report": {"common"},
    "image": {"", "common", "core"},  # of the plugin only compat, see LAYERS
    "": {"common", "core", "exchange", "image"},
}
ROOMS = sorted(path for path in PLUGIN.rglob("*.py") if path.name != "__init__.py" or path.parent == PLUGIN)


def name_of(path):
    return ".".join(path.relative_to(PLUGIN).with_suffix("").parts)


def imports(path):
    """(names of this package's modules, names of other packages) that a module imports."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            here = path.relative_to(PLUGIN).parts[: -node.level]
            base = [*here, *(node.module.split(".") if node.module else [])]
            for name in node.names:
                is_module = (PLUGIN.joinpath(*base, name.name)).with_suffix(".py").exists()
                ours.add(".".join([*base, name.name] if is_module else base))
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {name.name.split(".")[0] for name in node.names}
    return ours, others & (LIBRARIES | {"fairseq_codistill"})


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_layers(path):
    ours, others = imports(path)
    name = name_of(path)
    assert ours <= LAYERS[name], f"{name} may not import {ours - LAYERS[name]}"
    assert "fairseq_codistill" not in others, "inside the package imports are relative"
    folder = name.rpartition(".")[0]
    folders = {module.rpartition(".")[0] for module in ours} - {folder}
    assert folders <= FOLDERS[folder], f"{name} may not import from {folders - FOLDERS[folder]}"
    if folder in WITHOUT_FAIRSEQ:
        assert "fairseq" not in others, f"{name} must not know fairseq"
    if name in FOREIGN:
        assert others <= FOREIGN[name]


def test_every_room_is_on_the_map_and_no_two_need_each_other():
    assert {name_of(path) for path in ROOMS} == set(LAYERS)
    above = {name: set(below) for name, below in LAYERS.items()}
    while above:
        lowest = {name for name, below in above.items() if not below & above.keys()}
        assert lowest, f"these import each other in a circle: {sorted(above)}"
        above = {name: below for name, below in above.items() if name not in lowest}


def test_no_circles_among_the_benchmarks():
    """And each folder can be imported from its own folder, `communication` and what all share."""
    imports = {}
    for path in (ROOT / "benchmarks").glob("*/*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        named = re.findall(r"^ *from (benchmarks[\w.]*) import (.+)", path.read_text(), re.MULTILINE)
        imports[module] = {package for package, _ in named if package != "benchmarks"}
        imports[module] |= {f"{package}.{name}" for package, names in named for name in re.findall(r"\w+", names)}
        assert {name.split(".")[1] for name in imports[module]} <= {module.split(".")[1], "communication", "run_log"}, module
    assert len(imports) > 10
    while imports:
        lowest = {module for module, below in imports.items() if not below & imports.keys()}
        assert lowest, f"these import each other in a circle: {sorted(imports)}"
        imports = {module: below for module, below in imports.items() if module not in lowest}


def test_every_option_has_the_prefix():
    own = [field for field in dataclasses.fields(CodistillConfig) if not str(field.default).startswith("${")]
    names = {field.name for field in own} - {"_name", "label_smoothing"}  # which is refused
    assert names and all(name.startswith("codistill_") for name in names)
    assert all(field.metadata.get("help") for field in own if field.name != "_name")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their default is none of the options' own: it comes from the environment or from other options.
COMPUTED = {f"codistill_{name}" for name in ("peer", "peers", "dir", "interval", "alpha", "alpha_max", "alpha_warmup_epochs")}


def test_the_page_of_options_has_every_option_with_its_default():
    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(CodistillConfig):
        if field.name.startswith("codistill_"):
            row = re.search(rf"^\| `--{field.name.replace('_', '-')}` \| ([^|]+) \|", text, re.MULTILINE)
            assert row, f"the table lacks --{field.name.replace('_', '-')}"
            shown = row[1].strip(" `")
            default = "none" if field.default is None else "off" if field.default is False else str(field.default)
            if field.name in COMPUTED:
                assert shown not in ("", "none"), field.name
            else:
                assert shown == default, field.name
    documented = set(re.findall(r"--codistill-[a-z-]+[a-z]", "\n".join(page.read_text(encoding="utf-8") for page in PAGES)))
    known = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(CodistillConfig)}
    assert documented <= known, f"README and docs name options that do not exist: {documented - known}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_the_pages_point_to_exists(page):
    text = page.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} points to {target}, which is not there"
        assert not heading or heading in headings(found), f"{page.name} points to {target}#{heading}, which is not there"


@pytest.mark.parametrize("page", ["how_it_works", "development"])
def test_the_files_and_functions_that_the_maps_name_exist(page):
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    missing = {name for name in named if not (PLUGIN / name).exists() and not (ROOT / name).exists()}
    assert len(named) > 15 and not missing, f"docs/{page}.md names {missing}"
    for module, function in re.findall(r"`(losses|schedules|codistiller)\.(\w+)`", text):
        assert re.search(rf"^(def|class) {function}\b", (PLUGIN / f"core/{module}.py").read_text(), re.MULTILINE), function


def headings(page):
    """As GitHub makes them addresses."""
    titles = re.findall(r"^#+ (.+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("forbidden", [f"{ROOT}/", f"{Path.home()}/", "/tmp/"])
def test_no_path_of_one_machine_in_what_we_ship(forbidden):
    for folder in ("fairseq_codistill", "recipes", "data_prep", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".sh", ".md", ".txt", ".json", ".log"):
                text = path.read_text(encoding="utf-8", errors="replace").replace("/tmp/plasma", "")  # a default of fairseq
                assert forbidden not in text, path
