"""The page to try a network on: what each exit answers, how sure it is, what it costs, and similar training images.

`sssd space` fills a folder with all that the page needs, and `serve` shows it: here, or on a Space of the Hugging Face
Hub, where app.py does nothing else. So this module imports only what the Space's requirements.txt installs.

FOLDER/
    page.json       the title, and whether the network's answers are clusters
    model/          the network, as timm loads it
    examples/       images to pick
    clusters/       where a run's images could be read: the pretext network, its centroids, and nearest.parquet with
                    thumbnails of the images nearest to each
"""

import base64
import json
import math
import os
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from threading import Event, Lock
from typing import Any

import pyarrow.parquet as pq
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from sssd_zoo.data import inputs
from sssd_zoo.data.formats import CorruptImageError
from sssd_zoo.data.opening import Encoded
from sssd_zoo.errors import UserError
from sssd_zoo.errors.text import html, plain
from sssd_zoo.models import MultiExit, ensemble_logits, exits_asked, exits_taken, multiply_adds
from sssd_zoo.models.merged import Answers

PASSES = 5  # of each length; their median time is shown
SHOWN = 3  # most probable classes of each answer
THRESHOLD = 0.5  # where the slider starts
SLIDER = "Early-exit threshold: how sure an exit must be to answer"
LARGEST_FILE = 20_000_000  # bytes of an upload
LARGEST_REQUEST = LARGEST_FILE + 100_000  # bytes of a request with all that it holds
LARGEST_UPLOADS = 1_000_000_000  # bytes of all uploads that are kept, each for an hour
MAX_PIXELS = 50_000_000  # of an upload, by its header: what is decoded takes up to 16 bytes for each
REFUSED = "this page reads only images that you uploaded to it"
WAITING = 64  # requests in the queue, beyond which visitors are told to try again


@dataclass(frozen=True)
class Analysis:
    """What a network makes of one image.

    Attributes:
        probabilities: of the names by the exits 1 to 4, each a list.
        top: of the exits 1 to 4 and of the ensemble, the most probable names and their probabilities, best first.
        seconds: median time of a pass that stops at exit 1 to 4, and of one that computes all answers.
        cluster: number of the nearest centroid, where the page has clusters.
        confidences: of the exits 1 to 3 in single classes, which early exit goes by; by default those of `top`, which
            are greater where several classes have one name.
    """

    probabilities: list[list[float]]
    top: list[list[tuple[int, float]]]
    seconds: list[float]
    cluster: int | None
    confidences: Sequence[float] = ()

    def exit_taken(self, thresholds: Sequence[float]) -> int:
        """The exit, 1..4, that `forward_early` leaves at with these thresholds of the exits 1 to 3."""
        confidences = self.confidences or [answer[0][1] for answer in self.top[:3]]
        return int(exits_taken(torch.tensor(confidences).unsqueeze(1), thresholds))

    def early_answer(self, thresholds: Sequence[float]) -> tuple[int, float]:
        """The class that `forward_early` answers with these thresholds, and its probability."""
        taken = self.exit_taken(thresholds)
        if taken < 4:
            return self.top[taken - 1][0]
        asked = [self.probabilities[number - 1] for number in exits_asked(thresholds)]
        means = [sum(column) / len(asked) for column in zip(*asked, strict=True)]
        return max(enumerate(means), key=lambda pair: pair[1])


def pass_seconds(network: MultiExit, image: Tensor) -> list[float]:
    """Median times of passes that stop at exits 1 to 4 after asking the exits before, and of one that computes all.

    Args:
        network: with all exits, in eval mode.
        image: float32 [1, 3, S, S].
    """
    # No image leaves at the greatest number below 1, at which an exit is still asked; at 0 it leaves.
    stops = [[math.nextafter(1, 0)] * before + [0.0] * (3 - before) for before in range(4)]
    runs: list[Callable[[], Any]] = [partial(network.forward_early, image, thresholds) for thresholds in stops]
    runs.append(partial(network.forward_exits, image))
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(PASSES + 1):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if turn:  # the first of each is slower: memory is allocated and kernels are chosen
                times.append(time.perf_counter() - start)
    return [median(times) for times in seconds]


def load_folder(folder: Path, **kwargs: Any) -> Any:
    """A folder's network, in eval mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


class Clusters:
    """Finds the cluster of an image and shows the training images nearest to its centre.

    Args:
        folder: `clusters/` of a page's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.trunk = load_folder(folder, num_classes=0)
        self.centroids = load_file(folder / "centroids.safetensors")["centroids"]
        self.thumbnails: list[list[bytes]] = [[] for _ in self.centroids]
        nearest = pq.read_table(folder / "nearest.parquet").to_pydict()
        for cluster, image in zip(nearest["cluster"], nearest["image"], strict=True):
            self.thumbnails[cluster].append(image)

    def nearest(self, image: bytes) -> int:
        """The number of the centroid nearest to the trunk's L2-normalised features of an encoded image."""
        features = torch.nn.functional.normalize(self.trunk(network_input(image, self.trunk)))
        return int(torch.cdist(features, self.centroids)[0].argmin())

    def strip(self, cluster: int, count: int | None = None) -> str:
        """The cluster's thumbnails, nearest first, as HTML."""
        sources = [base64.b64encode(image).decode() for image in self.thumbnails[cluster][:count]]
        alt = f"training image of cluster {cluster}"
        return "".join(f'<img src="data:image/webp;base64,{source}" alt="{alt}">' for source in sources)


def percents(fractions: Sequence[float]) -> str:
    """'62%, 55% and 70%'."""
    *first, last = [f"{fraction:.0%}" for fraction in fractions]
    return f"{', '.join(first)} and {last}"


def network_input(image: bytes, network: Any) -> Tensor:
    """Decodes an image as `load_images` does, at a network's size and normalised for it: float32 [1, 3, S, S].

    Raises:
        CorruptImageError: if it cannot be decoded.
    """
    return inputs.prepare(Encoded("the image", image, None), network, MAX_PIXELS)


class Demo:
    """All that the page shows, without the page.

    Args:
        folder: as `sssd space` fills it.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "page.json").read_text(encoding="utf-8"))
        self.title: str = plain(about["title"])
        self.answers_are_clusters: bool = about["answers_are_clusters"]
        self.network = load_folder(folder / "model")
        names = self.network.pretrained_cfg.get("label_names")
        descriptions = self.network.pretrained_cfg.get("label_descriptions") or {}  # where names are WordNet's ids
        self.merged = Answers(names or [f"class {number}" for number in range(self.network.num_classes)])
        self.names: list[str] = [plain(descriptions.get(name, name)) for name in self.merged.names]
        self.costs = multiply_adds(self.network, self.network.pretrained_cfg["input_size"])
        self.clusters = Clusters(folder / "clusters") if (folder / "clusters").is_dir() else None
        self.examples = sorted(map(str, (folder / "examples").iterdir()))

    @torch.inference_mode()
    def analyse(self, image: bytes) -> Analysis:
        """Asks the network about an encoded image of any format and size.

        Raises:
            CorruptImageError: if it cannot be decoded.
        """
        pixels = network_input(image, self.network)
        logits = self.network.forward_exits(pixels).logits
        top = []
        for answer in [*logits, ensemble_logits(logits)]:
            best = self.merged.probabilities(answer[0]).topk(min(SHOWN, len(self.names)))
            top.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        seconds = pass_seconds(self.network, pixels)
        probabilities = [self.merged.probabilities(answer[0]).tolist() for answer in logits]
        confidences = [float(answer[0].softmax(0).max()) for answer in logits[:3]]
        cluster = None if self.clusters is None else self.clusters.nearest(image)
        return Analysis(probabilities, top, seconds, cluster, confidences)

    def introduction(self) -> str:
        """What the network is, as Markdown."""
        # A long name may break after these signs, rather than anywhere.
        heading = "<h1>" + re.sub(r"([_./-])", r"\1<wbr>", html(self.title)) + "</h1>"
        if self.answers_are_clusters:
            answers = (
                f"It was trained without labels, so its answers are not names but {len(self.names)} **clusters** of "
                "training images that look alike."
            )
        else:
            answers = f"It tells {len(self.names)} classes apart."
        return (
            f"{heading}\n\nA network with four exits: an image may leave at the first exit that is sure enough, and "
            f"nothing after it is computed. {answers}"
        )

    def refusal(self, error: CorruptImageError) -> str:
        """What is shown instead of answers for a file that is not an image, as HTML."""
        reason = html(str(error))
        return f'<div class="sssd"><p class="verdict">This file cannot be read as an image: {reason}.</p></div>'

    def verdict(self, analysis: Analysis, thresholds: Sequence[float]) -> str:
        """Where early exit stops, in a sentence of HTML."""
        taken = analysis.exit_taken(thresholds)
        label, probability = analysis.early_answer(thresholds)
        fraction = analysis.seconds[taken - 1] / analysis.seconds[3]
        what = f"<b>{html(self.names[label])}</b>, {probability:.0%} sure"
        if taken < 4:
            sentence = f"Leaves at <b>exit {taken}</b> with the answer {what}, in {fraction:.2f} of the time to exit 4."
        else:
            passed = f"{thresholds[0]:.0%}" if len(set(thresholds)) == 1 else f"its threshold ({percents(thresholds)})"
            who = self._last(thresholds)
            sentence = f"Goes to <b>exit 4</b>, as no exit before passes {passed}: {who} answers {what}."
        return f'<p class="verdict" data-exit="{taken}">{sentence}</p>'

    def _last(self, thresholds: Sequence[float]) -> str:
        """Who answers an image that no exit is sure of."""
        *others, last = exits_asked(thresholds)
        if not others:
            return "it alone"
        every = "all exits" if len(others) == 3 else f"exits {', '.join(map(str, others))} and {last}"
        return f"the ensemble of {every}"

    def answers(self, analysis: Analysis, thresholds: Sequence[float]) -> str:
        """The verdict, and a card for every exit and the ensemble, as HTML."""
        taken = analysis.exit_taken(thresholds)
        # An image that goes to the end after all exits were asked has the ensemble's answer.
        answering = 5 if taken == 4 and exits_asked(thresholds) == [1, 2, 3, 4] else taken
        cards = []
        names = ["1", "2", "3", "4", "ensemble"]
        for number, (name, top, seconds) in enumerate(zip(names, analysis.top, analysis.seconds, strict=True), start=1):
            state, note = "", ""
            if number == answering:
                state, note = "taken", f"<span class='note'>{'answers' if number == 5 else 'stops here'}</span>"
            elif taken < number <= 4:
                state, note = "skipped", "<span class='note'>not needed</span>"
            title = "Ensemble of all exits" if name == "ensemble" else f"Exit {name}"
            cost = f"{1000 * seconds:.1f} ms · {self.costs[name] / 1e6:,.0f} M MACs"
            bars = "".join(self._bar(label, probability) for label, probability in top)
            if self.answers_are_clusters and self.clusters is not None:
                bars += f'<div class="strip small">{self.clusters.strip(top[0][0], 6)}</div>'
            cards.append(
                f'<div class="card {state}" data-answer="{name}" data-label="{html(self.names[top[0][0]])}">'
                f'<div class="head"><b>{title}</b>{note}<span class="cost">{cost}</span></div>{bars}</div>'
            )
        return f'<div class="sssd">{self.verdict(analysis, thresholds)}{"".join(cards)}</div>'

    def _bar(self, label: int, probability: float) -> str:
        name = html(self.names[label])
        return (
            f'<div class="bar"><span class="name" title="{name}">{name}</span><span class="track">'
            f'<span style="width:{probability:.1%}"></span></span><span class="value">{probability:.0%}</span></div>'
        )

    def neighbours(self, analysis: Analysis) -> str:
        """The training images nearest to the centre of the image's cluster, as HTML; '' without clusters."""
        if self.clusters is None or analysis.cluster is None:
            return ""
        return (
            '<div class="sssd"><h3>Similar training images</h3><p>k-means clustered the training images by the '
            f"features of a network trained without labels. This image falls into cluster {analysis.cluster} of "
            f"{len(self.clusters.centroids)}; these images are nearest to the cluster's centre:</p>"
            f'<div class="strip" data-cluster="{analysis.cluster}">{self.clusters.strip(analysis.cluster)}</div></div>'
        )


CSS = """
.gradio-container { max-width: 1080px !important; margin: 0 auto !important; }
h1 { overflow-wrap: normal; line-height: 1.2; }
#image img { width: 100%; height: 100%; object-fit: contain; }
#examples .gallery { display: grid; grid-template-columns: repeat(5, 1fr); gap: 8px; }
#examples .gallery-item { aspect-ratio: 1; }
#examples .gallery-item, #examples .gallery-item * { display: block; width: 100%; height: 100%; max-width: none; }
#answers .html-container, #neighbours .html-container { padding: 0; }
#notes { font-size: 0.9em; opacity: 0.8; margin-top: 8px; }
.sssd h3 { margin: 8px 0 4px; }
.sssd p { margin: 4px 0 10px; line-height: 1.45; }
.sssd .verdict { font-size: 1.08em; margin: 0; padding: 10px 14px; border-radius: 10px;
    background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.sssd .card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px 14px; margin-top: 8px; }
.sssd .card.taken { border-color: var(--color-accent); box-shadow: inset 4px 0 0 var(--color-accent); }
.sssd .card.skipped > * { opacity: 0.6; }
.sssd .head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 10px; margin-bottom: 4px; }
.sssd .note { font-size: 0.8em; padding: 1px 8px; border-radius: 9px; border: 1px solid var(--border-color-primary); }
.sssd .taken .note { background: var(--color-accent); border-color: var(--color-accent); color: white; }
.sssd .cost { margin-left: auto; font-size: 0.82em; opacity: 0.75; }
.sssd .bar { display: grid; grid-template-columns: 9em 1fr 2.8em; gap: 10px; align-items: center; line-height: 1.6; }
.sssd .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.sssd .track { height: 9px; border-radius: 5px; background: var(--border-color-primary); overflow: hidden; }
.sssd .track span { display: block; height: 100%; background: var(--color-accent); opacity: 0.45; }
.sssd .head + .bar .track span { opacity: 1; }
.sssd .head + .bar .name, .sssd .head + .bar .value { font-weight: 600; }
.sssd .value { text-align: right; font-variant-numeric: tabular-nums; }
.sssd .strip { display: grid; grid-template-columns: repeat(8, minmax(0, 110px)); gap: 8px; }
.sssd .strip.small { display: flex; margin-top: 6px; }
.sssd .strip img { width: 100%; aspect-ratio: 1; border-radius: 6px; margin: 0; }
.sssd .strip.small img { width: 40px; }
@media (max-width: 640px) {
    .main { padding: 12px 16px !important; }
    h1 { font-size: 1.4em !important; }
    .sssd .strip { grid-template-columns: repeat(4, 1fr); }
    .sssd .bar { grid-template-columns: 7em 1fr 2.8em; }
}
"""


class Uploads(set[str]):
    """The files that visitors uploaded, and which visitor may have which of them analysed.

    gradio takes any path of the server from a request, and notes of an upload only where it lies (under a name that
    cannot be guessed, but that is the same for everyone who uploads the same bytes). Here each upload gives one
    session, the first that names the file, the right to it. gradio adds to this set, and removes what it deletes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()
        self.unclaimed: dict[str, int] = defaultdict(int)  # uploads of a file that no session has named yet
        self.sessions: dict[str, set[str]] = defaultdict(set)  # that may read a file

    def update(self, *others: Iterable[str]) -> None:
        """Notes uploads, and forgets the sessions of files that are gone."""
        with self.lock:
            for known in (self.unclaimed, self.sessions):
                for path in known.keys() - self:
                    del known[path]
            for path in (path for paths in others for path in paths):
                self.add(path)
                self.unclaimed[path] += 1

    def allows(self, path: str, session: str) -> bool:
        """Whether a session may read a file; claims an upload that is no session's yet."""
        with self.lock:
            if path not in self:
                return False
            if session not in self.sessions[path] and self.unclaimed[path]:
                self.unclaimed[path] -= 1
                self.sessions[path].add(session)
            return session in self.sessions[path]

    def full(self) -> bool:
        """Whether no more can be kept."""
        files = [Path(path) for path in list(self)]
        return sum(file.stat().st_size for file in files if file.exists()) > LARGEST_UPLOADS


def read_upload(path: str) -> bytes:
    """The bytes of a file that was uploaded; never those of a link's target, nor more than LARGEST_FILE.

    Raises:
        OSError: if it is gone, or is a link.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        return file.read(LARGEST_FILE)


class SmallRequests:
    """ASGI middleware that ends requests of more than LARGEST_REQUEST bytes, and uploads where too many are kept.

    gradio's own limit is of each file in an upload, which may have a thousand, and of nothing else that is posted.
    """

    def __init__(self, app: Any, uploads: Uploads) -> None:
        self.app, self.uploads = app, uploads

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes the request on unless it is too large, or an upload while too many are kept."""
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not announced.isdigit() or int(announced) > LARGEST_REQUEST:
            await PlainTextResponse("the request is too large", 413)(scope, receive, send)
            return
        if scope["path"].endswith("/upload") and self.uploads.full():
            await PlainTextResponse("too many images are kept: try again in an hour", 503)(scope, receive, send)
            return
        await self.app(scope, CountedRequest(receive), send)


class CountedRequest:
    """ASGI's `receive`, which ends a request once more than LARGEST_REQUEST bytes of it have come."""

    def __init__(self, receive: Any) -> None:
        self.receive = receive
        self.received = 0  # bytes

    async def __call__(self) -> Any:
        """The next message."""
        from starlette.exceptions import HTTPException

        message = await self.receive()
        self.received += len(message.get("body", b""))
        if self.received > LARGEST_REQUEST:
            raise HTTPException(413, "the request is too large")
        return message


class Page:
    """The page: its parts, what it opens for a visitor, and what it answers.

    Attributes:
        demo: what it shows.
        uploads: of its visitors.
        examples: the files of `demo`, by the paths that browsers know.
        calibrated: the thresholds of a network that `sssd early-exit` calibrated, which the page starts with.
    """

    def __init__(self, demo: Demo) -> None:
        self.demo = demo
        self.uploads = Uploads()
        self.examples: dict[str, Path] = {}
        self.calibrated: list[float] | None = demo.network.thresholds

    def blocks(self) -> Any:
        """The page as gradio's Blocks."""
        import gradio as gr

        with gr.Blocks(title=self.demo.title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            page.upload_file_set = self.uploads
            page.temp_file_sets.append(self.uploads)
            gr.Markdown(self.demo.introduction(), latex_delimiters=[])
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    image = self._image()
                with gr.Column(scale=3, min_width=320):
                    controls = self._controls()
                    answers = gr.HTML(elem_id="answers")
            neighbours = gr.HTML(elem_id="neighbours", visible=self.demo.clusters is not None)
            gr.Markdown(
                elem_id="notes",
                value=f"Times are medians of {PASSES} passes of this one image on the machine that runs this page; "
                "those of exits 2 to 4 include the exits asked on the way. Images are cropped to a square and resized "
                f"to {self.demo.network.pretrained_cfg['input_size'][-1]} px, as in training.",
            )
            self._connect(page, image, controls, answers, neighbours)
        return page

    def _image(self) -> Any:
        """Where a visitor gives an image, above the examples."""
        import gradio as gr

        image: Any = gr.Image(
            value=self.demo.examples[0],
            label="Your image, or one of those below",
            sources=["upload", "clipboard"],
            height=260,
            elem_id="image",
            buttons=[],
        )
        gr.Examples(self.demo.examples, image, label="Examples", elem_id="examples", examples_per_page=100)
        # The browser names the copies that gradio serves; they stay as long as the page.
        self.examples |= {image.move_resource_to_block_cache(path): Path(path) for path in self.demo.examples}
        image.keep_in_cache.update(self.examples)
        # What else a request names gradio would fetch (from an address, too) or later delete.
        image.async_move_resource_to_block_cache = self.known_path
        return image

    def _controls(self) -> tuple[Any, Any]:
        """The box that takes the calibrated thresholds, and the slider of one for all exits."""
        import gradio as gr

        calibrated = self.calibrated
        use_calibrated = gr.Checkbox(
            calibrated is not None,
            label=f"Thresholds as calibrated: {percents(calibrated)} for exits 1 to 3" if calibrated else "",
            visible=calibrated is not None,
            elem_id="own",
        )
        threshold = gr.Slider(
            0, 1, THRESHOLD, step=0.01, label=SLIDER, interactive=calibrated is None, elem_id="threshold"
        )
        return use_calibrated, threshold

    def _connect(self, page: Any, image: Any, controls: tuple[Any, Any], answers: Any, neighbours: Any) -> None:
        """Says what happens when the visitor gives an image or changes the thresholds."""
        import gradio as gr

        # gradio calls the endpoints by the names of these functions.
        def look(file: Any, use_calibrated: bool, threshold: float, request: gr.Request) -> Any:
            return self.show(file, use_calibrated, threshold, request.session_hash)

        use_calibrated, threshold = controls
        analysis = gr.State()
        outputs = [analysis, answers, neighbours]
        private: dict[str, Any] = {"api_visibility": "private"}
        # Without gradio's preprocessing, which fails on damaged files with its own words, the file comes as it was
        # given (that it is one of the visitor's is checked before): `decode` reads it, as it reads the training images.
        given, moved = [image, *controls], [analysis, *controls]
        quiet: dict[str, Any] = {"show_progress": "hidden", **private}
        page.load(look, given, outputs, preprocess=False, **private)
        image.change(look, given, outputs, preprocess=False, show_progress="minimal", **private)
        threshold.change(self.answers, moved, answers, trigger_mode="always_last", **quiet)
        use_calibrated.change(self.answers, moved, answers, **quiet)
        use_calibrated.change(lambda ticked: gr.update(interactive=not ticked), use_calibrated, threshold, **quiet)

    def show(
        self, file: Any, use_calibrated: bool, threshold: float, session: str | None
    ) -> tuple[Analysis | None, str, str]:
        """What the network makes of a file, and its answers and neighbours as HTML."""
        if file is None:
            return None, "", ""
        image = self.read(file, session)
        try:
            analysis = self.demo.analyse(image)
        except CorruptImageError as error:
            return None, self.demo.refusal(error), ""
        return analysis, self.answers(analysis, use_calibrated, threshold), self.demo.neighbours(analysis)

    def answers(self, analysis: Analysis | None, use_calibrated: bool, threshold: float) -> str:
        """The answers at the thresholds chosen, as HTML."""
        return "" if analysis is None else self.demo.answers(analysis, self.thresholds(use_calibrated, threshold))

    def thresholds(self, use_calibrated: bool, threshold: float) -> list[float]:
        """The calibrated thresholds, or the slider's for all three exits; refuses what is not a number in 0..1."""
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise refused("a threshold is a number in 0..1")
        return self.calibrated if use_calibrated and self.calibrated is not None else [float(threshold)] * 3

    def read(self, file: Any, session: str | None) -> bytes:
        """The bytes of the file that a request names: an example, or what this visitor uploaded; refuses others."""
        path: Any = file.get("path") if isinstance(file, dict) else None
        if isinstance(path, str) and path in self.examples:
            return self.examples[path].read_bytes()
        if not isinstance(path, str) or session is None or not self.uploads.allows(path, session):
            raise refused(REFUSED)
        try:
            return read_upload(path)
        except OSError:  # an hour has passed
            raise refused("the image is gone: upload it again") from None

    async def known_path(self, path: str) -> str:
        """The path, if it is an example's or an upload's; refuses others."""
        if path in self.uploads or path in self.examples:
            return path
        raise refused(REFUSED)


def refused(message: str) -> Exception:
    """The error that shows a visitor a message."""
    import gradio as gr

    error: Exception = gr.Error(message, print_exception=False)
    return error


def build(demo: Demo) -> Any:
    """The page as gradio's Blocks."""
    return Page(demo).blocks()


def serve(folder: Path, port: int | None = None) -> None:
    """Shows the page until it is interrupted.

    Args:
        folder: as `sssd space` fills it.
        port: on this machine; by default the first that is free from 7860 on.

    Raises:
        UserError: if the port is taken.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    page = build(Demo(folder)).queue(max_size=WAITING)
    # No fonts, scripts or counts from elsewhere: the page works without a network.
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, url, _ = page.launch(
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=CSS,
            enable_monitoring=False,
            max_file_size=LARGEST_FILE,
            app_kwargs={"middleware": [Middleware(SmallRequests, uploads=page.upload_file_set)]},
        )
    except OSError as error:
        raise UserError(f"cannot serve the page: {error}; give another --port") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does, and leaves no folder behind
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    try:
        Event().wait()
    except KeyboardInterrupt:
        page.close()
