"""Small archives with the layouts of the published ones, and a loopback server that offers files and can misbehave."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import os
import re
import signal
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data_prep"))

import grammar_corpus  # noqa: E402

TED_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


def grammar_pairs(count: int, seed: int) -> list:
    """(English, German) pairs."""
    return list(itertools.islice(grammar_corpus.sentence_pairs(seed), count))


# --- texts ------------------------------------------------------------------------------------------------------------

# Pairs that the cleaning drops or that tools split into lines differently; (English, German).
ODD_PAIRS = [
    ("", "Leer."),
    ("Yes.", "Ja, das ist wahrlich sehr viel länger."),  # ratio
    (" ".join(["so"] * 180) + ".", " ".join(["so"] * 180) + "."),  # length
    ("A line\u2028separator & <b>tags</b> | pipes [x].", "Ein Zeilen\u2028trenner & <b>Tags</b> | Rohre [x]."),
    ("Next\u0085line and\x1cfile\x0bseparators.", "Nächste\u0085Zeile und\x1cDatei\x0bTrenner."),
    ("A bell\x07 and a nul\x00 are gone.", "Eine Glocke\x07 und ein Nul\x00 sind weg."),
    ("Hard\xa0spaces\u3000and\u200bnone…", "Harte\xa0Leerzeichen\u3000und\u200bkeine…"),
    ("Carriage\rreturn, 1,000.5 and 3.5% at 5 p.m. in the U.S.", "Wagen\rRücklauf, 1.000,5 und 3,5 % um 17 Uhr z.B."),
    ("ΣΑΣ IS GREEK, ISN'T IT? 1990's.", "ΣΑΣ IST GRIECHISCH, „nicht wahr“? '90er."),
    ("x" * 1001, "y" * 1001),  # a word too long
]


def talk_texts(pairs: list) -> dict:
    """``train.tags.de-en.LANG``: talks of seven pairs with their metadata, the odd pairs in the middle."""
    pairs = pairs[: len(pairs) // 2] + ODD_PAIRS + pairs[len(pairs) // 2 :]
    texts = {}
    for side, language in enumerate(("en", "de")):
        lines = []
        for number in range(0, len(pairs), 7):
            lines += [f"<url>http://talks.example/{number}</url>", f"<keywords>{language}, talks</keywords>"]
            lines += [f"<talkid>{number}</talkid>", f"<title>Talk {number} of dogs</title>"]
            lines += [f"<description>Description {number} of the cats.</description>"]
            lines += [pair[side] for pair in pairs[number : number + 7]]
        texts[f"train.tags.de-en.{language}"] = "".join(line + "\n" for line in lines).encode()
    return texts


def segment_text(lines: list, name: str = "set") -> bytes:
    body = "".join(f'<seg id="{number}"> {line} </seg>\n' for number, line in enumerate(lines, 1))
    head = f'<?xml version="1.0" encoding="UTF-8"?>\n<mteval>\n<refset setid="{name}">\n<doc docid="1">\n'
    return f"{head}<title>Not a sentence</title>\n{body}</doc>\n</refset>\n</mteval>\n".encode()


def plain_text(lines: list) -> bytes:
    return "".join(line + "\n" for line in lines).encode()


# --- archives ---------------------------------------------------------------------------------------------------------


def tgz(files: dict, extra: tuple = ()) -> bytes:
    """A gzipped tar of ``files`` by path, then the TarInfo members ``extra``."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for folder in sorted({str(Path(path).parent) for path in files} - {"."}):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, 1 if kind == tarfile.REGTYPE else 0
    return info


def zipped(files: dict) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return out.getvalue()


def iwslt14_texts(train: int = 150, held_out: int = 8) -> dict:
    pairs = grammar_pairs(train + 5 * held_out, seed=14)
    files = {f"de-en/{name}": data for name, data in talk_texts(pairs[:train]).items()}
    for number, name in enumerate(TED_SETS):
        drawn = pairs[train + number * held_out : train + (number + 1) * held_out]
        drawn = [("It’s “true”, isn’t it?", "Das ist’s „wahr“, nicht?"), *drawn[1:]]
        for side, language in enumerate(("en", "de")):
            data = segment_text([pair[side] for pair in drawn], name)
            files[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = data
    files["de-en/README"] = b"Talks.\n"
    return files


def wmt16_archives(pairs_each: int = 60, held_out: int = 12) -> dict:
    """The four archives by name; the sets of other languages and years beside the wanted ones."""
    pairs = grammar_pairs(3 * pairs_each + 2 * held_out, seed=16)
    long = (" ".join(["go"] * 260), " ".join(["los"] * 260))
    quoted = [long, ("He said “go”, (now) — and…", "Er sagte „geh“, (jetzt) — und…."), ("Ice-cream.", 'Das "Eis-Fach."')]
    texts = {}
    layouts = {
        "training-parallel-europarl-v7.tgz": "training/europarl-v7.de-en.{}",
        "training-parallel-commoncrawl.tgz": "commoncrawl.de-en.{}",
        "training-parallel-nc-v11.tgz": "training-parallel-nc-v11/news-commentary-v11.de-en.{}",
    }
    for number, (archive, path) in enumerate(layouts.items()):
        drawn = pairs[number * pairs_each : (number + 1) * pairs_each] + (ODD_PAIRS + quoted if number == 1 else [])
        files = {
            path.format(language): plain_text([pair[side] for pair in drawn]) for side, language in enumerate(("en", "de"))
        }
        files[path.format("fr").replace("de-en", "fr-en")] = b"Bonjour.\n"
        texts[archive] = tgz(files)
    valid, test = pairs[3 * pairs_each : 3 * pairs_each + held_out], pairs[3 * pairs_each + held_out :]
    dev = {}
    for side, language in enumerate(("en", "de")):
        dev[f"dev/newstest2013.{language}"] = plain_text([pair[side] for pair in valid])
        dev[f"dev/newstest2013-src.{language}.sgm"] = segment_text([pair[side] for pair in valid])
        for kind in ("src", "ref"):
            lines = ["“It’s”", *(pair[side] for pair in test[1:])]
            dev[f"dev/newstest2014-deen-{kind}.{language}.sgm"] = segment_text(lines)
        dev[f"dev/newstest2014-fren-src.{language}.sgm"] = segment_text(["Non."])
    texts["wmt19-dev.tgz"] = tgz(dev)
    return texts


def tatoeba_rows(count: int = 240) -> list:
    """(English, German) with every third English sentence twice, and translations that several sentences share."""
    pairs = grammar_pairs(count, seed=3)
    rows = list(pairs)
    rows += [(english, german.replace(".", "!")) for english, german in pairs[::3]]
    rows += [(f"Indeed: {english}", german) for english, german in pairs[::5]]
    return sorted(rows, key=lambda row: len(row[0]))


def tatoeba_zip(rows: list) -> bytes:
    text = "".join(f"{english}\t{german}\tCC-BY 2.0 (France) Attribution: tatoeba.org #1\n" for english, german in rows)
    return zipped({"_about.txt": b"Tab-delimited.\n", "deu.txt": text.encode()})


def own_texts(prefix: str = "all", count: int = 120, seed: int = 5) -> dict:
    """Somebody's text in two languages that no tool knows, one side gzipped."""
    pairs = grammar_pairs(count, seed)
    sources, targets = plain_text([german for _, german in pairs]), plain_text([english for english, _ in pairs])
    return {f"{prefix}.xx": sources, f"{prefix}.yy.gz": gzip.compress(targets, mtime=0)}


def kill_this_process(*_: object) -> None:
    """What a system that runs out of memory does to a worker. It is here since workers import the module of what they run."""
    os.kill(os.getpid(), signal.SIGKILL)


# --- server -----------------------------------------------------------------------------------------------------------


class Site:
    """What the server offers and how it behaves; ``asked`` are (path, Range) of every request."""

    def __init__(self) -> None:
        self.files: dict = {}
        self.break_after: dict = {}  # by name: bytes after which each answer in turn is cut; an empty list: no more
        self.no_length: set = set()  # names of which no length is announced
        self.asked: list = []
        self.address = ""

    def offers(self, *names: str) -> tuple:
        """Addresses of files, below any folder."""
        return tuple(f"{self.address}/{name}" for name in names)


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, site: Site, *args: object) -> None:
        self.site = site
        super().__init__(*args)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.site.asked.append((self.path, self.headers.get("Range")))
        if name not in self.site.files or self.path.startswith("/gone"):
            self.send_error(404)
            return
        body = self.site.files[name]
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fits = self.headers.get("If-Range") in (None, tag)
        first = int(start[1]) if start and fits else 0
        self.send_response(206 if first else 200)
        self.send_header("ETag", tag)
        if name not in self.site.no_length:
            self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        cuts = self.site.break_after.get(name)
        self.wfile.write(body[first:][: cuts.pop(0)] if cuts else body[first:])

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[Site]:
    """A site on a loopback port, until the end of the block."""
    site = Site()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, site))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
