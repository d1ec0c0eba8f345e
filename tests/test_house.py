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
    "guard": set(),
    "losses": {"guard"},
    "schedules": set(),
    "topology": set(),
    "manifest": set(),
    "run": {"manifest"},
    "others": {"manifest"},
    "membership": {"manifest", "others", "run", "stores"},
    "structure": {"manifest"},
    "snapshot": {"manifest"},
    "lock_file": set(),
    "directory_store": {"lock_file", "manifest"},
    "stores": {"directory_store", "lock_file", "manifest", "url_store"},
    "url_store": {"manifest"},
    "compat": set(),
    "exchange": {"manifest", "membership", "others", "run", "snapshot", "stores", "structure"},
    "observer": {"manifest", "run", "stores"},
    "worker": set(),
    "courier": {"exchange", "manifest", "observer", "snapshot", "worker"},
    "int8": set(),
    "replica": {"int8"},
    "fused": {"guard", "losses", "output_layer"},
    "output_layer": set(),
    "group": set(),
    "meeting": {"courier", "exchange", "group", "manifest"},
    "codistiller": {
        "courier", "exchange", "group", "int8", "manifest", "meeting", "replica", "snapshot", "schedules", "structure",
        "topology", "worker",
    },  # fmt: skip
    "wrapping": set(),
    "ending": set(),
    "data_order": {"schedules", "wrapping"},
    "hook": {"codistiller", "data_order", "ending", "exchange", "wrapping"},
    "config": {"losses", "paths", "schedules", "topology"},
    "criterion": {
        "config", "hook", "codistiller", "exchange", "fused", "guard", "losses", "output_layer", "stores", "teachers",
        "topology",
    },  # fmt: skip
    "teachers": {"output_layer"},
    "fairseq_log": set(),
    "launch_hydra": set(),
    "launch_command": {"launch_hydra"},
    "launch_checks": {"launch_command"},
    "launch_outputs": {"launch_command"},
    "launch_plan": {"launch_checks", "launch_command", "launch_outputs"},
    "output": set(),
    "paths": set(),
    "launch_checkpoint": set(),
    "launch_guard": set(),
    "launch_progress": {"fairseq_log"},
    "launch_error": {"launch_progress"},
    "launch_peer": {"launch_guard", "launch_plan", "launch_progress"},
    "launch_view": {"launch_peer", "launch_plan"},
    "launch_supervisor": {
        "launch_checkpoint", "launch_error", "launch_guard", "launch_peer", "launch_plan", "launch_view", "output",
    },  # fmt: skip
    "launch_cost": {"launch_view", "topology"},
    "launch_preview": {"launch_cost", "launch_plan", "launch_view", "observer", "stores"},
    "launch_slurm": {"launch_checkpoint", "launch_command", "launch_outputs", "launch_plan"},
    "launch_status": {"launch_view", "manifest", "observer", "output", "stores"},
    "launch": {"launch_plan", "launch_preview", "launch_status", "launch_supervisor", "launch_view", "output"},
    "report_log": {"fairseq_log"},
    "report_summary": {"fairseq_log", "report_log"},
    "report_notes": {"fairseq_log", "report_log", "report_summary"},
    "report_table": {"fairseq_log", "report_notes", "report_summary"},
    "report_figure": {"fairseq_log", "report_log", "report_notes", "report_summary", "report_table"},
    "report_files": {"paths", "report_log", "report_notes", "report_summary"},
    "report": {"output", "paths", "report_figure", "report_files", "report_notes", "report_summary", "report_table"},
    "image_transforms": {"compat"},
    "image_options": {"image_transforms"},
    "image_folder": {"compat", "image_transforms", "paths"},
    "image_models": {"compat"},
    "lr_schedules": set(),
    "nesterov": set(),
    "image_classification": {"compat", "image_folder", "image_options", "image_transforms", "lr_schedules"},
    "image_predict": {"compat", "image_classification", "image_folder", "image_models", "paths"},
    "plugin": {"compat", "criterion", "image_classification", "image_models", "lr_schedules", "nesterov"},
    "registration": set(),  # it imports plugin when fairseq is there
    "__init__": {"registration"},
}
# Which libraries a room may know of, where that is a rule; the commands must start without fairseq and torch.
FOREIGN = {
    "guard": {"torch"}, "losses": {"torch"}, "fused": {"torch"}, "output_layer": {"torch"}, "int8": {"torch"},
    "paths": set(), "schedules": set(), "topology": set(), "snapshot": {"torch", "safetensors"}, "exchange": set(),
    "manifest": set(), "stores": set(), "directory_store": set(), "lock_file": set(),
    "run": set(), "others": set(), "membership": set(), "structure": set(),
    "url_store": {"fsspec"}, "courier": {"torch"}, "replica": {"torch"},
    "codistiller": {"torch"}, "group": {"torch"}, "hook": set(), "worker": set(), "wrapping": set(), "ending": set(),
    "data_order": set(), "config": {"fairseq", "omegaconf"}, "__init__": set(), "registration": set(),
}  # fmt: skip
LIBRARIES = {"torch", "fairseq", "safetensors", "omegaconf", "numpy", "matplotlib", "rich", "fsspec", "hydra"}


def imports(path):
    """(names of this package's modules, names of other packages) that a module imports."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            ours |= {node.module.split(".")[0]} if node.module else {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {name.name.split(".")[0] for name in node.names}
    return ours, others & (LIBRARIES | {"fairseq_codistill"})


@pytest.mark.parametrize("path", sorted(PLUGIN.glob("*.py")), ids=lambda path: path.stem)
def test_layers(path):
    ours, others = imports(path)
    assert ours <= LAYERS[path.stem], f"{path.stem} may not import {ours - LAYERS[path.stem]}"
    assert "fairseq_codistill" not in others, "inside the package imports are relative"
    if path.stem in FOREIGN:
        assert others <= FOREIGN[path.stem]


def test_the_package_is_flat_and_every_room_is_on_the_map():
    assert not [path for path in PLUGIN.iterdir() if path.is_dir() and path.name not in ("__pycache__", ".ruff_cache")]
    assert {path.stem for path in PLUGIN.glob("*.py")} == set(LAYERS)


def test_every_option_has_the_prefix():
    own = [field for field in dataclasses.fields(CodistillConfig) if not str(field.default).startswith("${")]
    names = {field.name for field in own} - {"_name", "label_smoothing"}  # which is refused
    assert names and all(name.startswith("codistill_") for name in names)
    assert all(field.metadata.get("help") for field in own if field.name != "_name")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Their default is none of the options' own: it comes from the environment or from other options.
COMPUTED = {f"codistill_{name}" for name in ("peer", "peers", "dir", "interval", "alpha", "alpha_max")}


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
