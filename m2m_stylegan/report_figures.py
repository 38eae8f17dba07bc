"""Figures of the report as text for an HTML page: curves as inline SVG that follows the page's colours, pictures as data URLs."""

import base64
import html
import io
import re
from collections.abc import Callable
from pathlib import Path

import PIL.Image

from m2m_stylegan.errors import UserError
from m2m_stylegan.report_data import Point
from m2m_stylegan.scores import SOURCE

MARKERS, DASHES = 'osD^vPX*', ['-', '--', '-.', (0, (1, 1))]
INK = '#f000ff'  # Colours in the drawing are place-holders for those of the page: this one for its text, '#f000NN' for series NN.
NUM_COLORS = 8  # of the page's style: --series-0 ...
ATTEMPTS = [(1, 85), (1, 70), (0.75, 70), (0.5, 75), (0.5, 50), (0.35, 50), (0.25, 40)]  # scale, WebP quality
STRETCH = 6  # An axis is logarithmic if its values span more than this factor.


def chart(curves: dict[str, list[Point]], x_of: Callable[[Point], float | None], x_label: str, y_label: str, floor: float | None, name: str) -> str:
    """Medians over seeds as lines, least to largest as bands, over x_of(point); starts at the source. Returns an <svg> element.

    Methods without an x are left out. name: prefix of ids, unique in the page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style = {'svg.fonttype': 'none', 'svg.hashsalt': name, 'text.parse_math': False, 'font.size': 9, 'text.color': INK, 'axes.edgecolor': INK,
             'axes.labelcolor': INK, 'xtick.color': INK, 'ytick.color': INK, 'grid.color': INK, 'grid.alpha': 0.15, 'axes.spines.top': False,
             'axes.spines.right': False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.7, 3.6), layout='constrained')
        axes = figure.add_subplot()
        start = [point for point in curves.get(SOURCE, []) if x_of(point) is not None]
        methods = [method for method in curves if method != SOURCE]
        xs, ys = [], [point.median for point in start]
        for i, method in enumerate(methods):
            own = [point for point in curves[method] if x_of(point) is not None]
            if own:
                xs += [x_of(point) for point in own]
                ys += [value for point in own for value in (point.low, point.high)]
                _line(axes, [*start, *own], x_of, f'#f000{i % NUM_COLORS:02x}', method, i)
        if floor is not None and floor * STRETCH < min(ys, default=floor):  # A line so far below would squeeze the curves into one.
            axes.plot([], [], ' ', label=f'real vs. real: {floor:.3g}, below')
        elif floor is not None:
            axes.axhline(floor, color=INK, linewidth=1, linestyle=(0, (1, 2)), label='real vs. real')
            ys.append(floor)
        _scales(axes, xs, ys)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(True)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc='outside lower center', ncols=3, frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None, 'Creator': None, 'Format': None, 'Type': None})
    return _inline(buffer.getvalue(), name, f'{y_label} over {x_label}: {", ".join(methods)}')


def _line(axes, points: list[Point], x_of, color: str, label: str, i: int) -> None:
    x = [x_of(point) for point in points]
    axes.fill_between(x, [p.low for p in points], [p.high for p in points], color=color, alpha=0.15, linewidth=0)
    axes.plot(x, [p.median for p in points], color=color, label=label, linewidth=1.6, marker=MARKERS[i % len(MARKERS)], markersize=4,
              linestyle=DASHES[i // NUM_COLORS % len(DASHES)])


def _scales(axes, xs: list[float], ys: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def plain(value, _position):
        return f'{value:g}'

    if ys and min(ys) > 0 and max(ys) > STRETCH * min(ys):
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.yaxis.set_minor_formatter(NullFormatter())
    positive = [x for x in xs if x > 0]
    if positive and max(positive) > STRETCH ** 2 * min(positive):  # Time 0, the source, needs a place on the axis.
        axes.set_xscale('symlog', linthresh=min(positive), subs=(2, 5))
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlim(left=0)


def _inline(svg: str, name: str, description: str) -> str:
    """The <svg> element of a file as part of an HTML page: no names to look up, unique ids, colours of the page, as wide as there is room."""
    svg = svg[svg.index('<svg'):]
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg).replace('url(#', f'url(#{name}-')
    svg = re.sub(r'#f000([0-9a-f]{2})', lambda m: 'currentColor' if m[0] == INK else f'var(--series-{int(m[1], 16)})', svg)
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{html.escape(description)}">', svg)
    return svg.strip()


def data_urls(paths: dict[str, Path], budget_bytes: int) -> dict[str, tuple[str, int, int]]:
    """Pictures as WebP {key: (data URL, width, height)}, in the best of ATTEMPTS with which all URLs together have at most budget_bytes.

    Raises UserError for a file that is no picture.
    """
    images = {}
    for key, path in paths.items():
        try:
            with PIL.Image.open(path, formats=['PNG']) as img:
                images[key] = img.convert('RGB')
        except (OSError, ValueError, PIL.Image.DecompressionBombError) as err:
            raise UserError(f'{path} cannot be read as a picture ({err}). Remove it and its line in results.jsonl, and compare again.') from err
    urls = {}
    for scale, quality in ATTEMPTS:
        urls = {key: _data_url(img, scale, quality) for key, img in images.items()}
        if sum(len(url) for url, _, _ in urls.values()) <= budget_bytes:
            break
    return urls


def _data_url(img: PIL.Image.Image, scale: float, quality: int) -> tuple[str, int, int]:
    size = tuple(max(round(side * scale), 1) for side in img.size)
    buffer = io.BytesIO()
    img.resize(size, PIL.Image.Resampling.LANCZOS).save(buffer, 'WEBP', quality=quality, method=4)
    return f'data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}', *img.size
