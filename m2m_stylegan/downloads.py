"""Files from the web: resumable downloads into a checksummed cache, and the short names of official pickles."""

import contextlib
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from m2m_stylegan import locks
from m2m_stylegan.errors import UserError
from m2m_stylegan.files import atomic_write, default_cache_dir, sha256_of

_OFFICIAL = 'https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/transfer-learning-source-nets/'
OFFICIAL_PICKLES = {
    'ffhq256': _OFFICIAL + 'ffhq-res256-mirror-paper256-noaug.pkl',
    'ffhq512': _OFFICIAL + 'ffhq-res512-mirror-stylegan2-noaug.pkl',
    'ffhq1024': _OFFICIAL + 'ffhq-res1024-mirror-stylegan2-noaug.pkl',
    'celebahq256': _OFFICIAL + 'celebahq-res256-mirror-paper256-kimg100000-ada-target0.5.pkl',
    'lsundog256': _OFFICIAL + 'lsundog-res256-paper256-kimg100000-noaug.pkl',
}
DEMO_PICKLE = Path(__file__).parent / 'assets' / 'demo.pkl'

_PAUSES_S = (1, 2, 4, 8)  # between attempts that bring nothing; any progress starts the series anew
_CHUNK_BYTES = 1 << 16
_LOCAL_HOSTS = ('localhost', '127.0.0.1', '::1')


def resolve(name_or_path_or_url: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> Path:
    """Path of a pickle given as `demo`, as a short name (OFFICIAL_PICKLES), as an https URL (downloaded once), or as a path.

    Raises UserError if it is none of these, or as `fetch` does.
    """
    source = os.fspath(name_or_path_or_url)
    if source == 'demo':
        return _existing(DEMO_PICKLE, 'this installation lacks its demo pickle; install the package again')
    if source in OFFICIAL_PICKLES:
        return fetch(OFFICIAL_PICKLES[source], cache_dir)
    if '://' in source:
        return fetch(source, cache_dir)
    names = ', '.join(['demo', *OFFICIAL_PICKLES])
    return _existing(Path(source), f'expected an existing file, an https:// URL, or one of the short names {names}')


def fetch(
    url: str,
    cache_dir: str | os.PathLike | None = None,
    *,
    progress: bool = True,
    sha256: str | None = None,
    timeout_s: float = 30,
    allow_local_http: bool = False,
) -> Path:
    """Download a file once; later calls return the copy in the cache after comparing its checksum with the one stored beside it.

    * `cache_dir`: default `$M2M_CACHE_DIR`, else `~/.cache/m2m_stylegan`. Processes that want the same file wait for each other.
    * `sha256`: what the file must have; None accepts any content over https.
    * `timeout_s`: longest silence of the server. A broken connection is tried again and goes on where it stopped, also in later
      calls, provided that the server says that the file is unchanged.
    * `allow_local_http`: accept plain http from this machine (for tests).

    Raises UserError, which says what to do, if the URL or a redirect is not https, the server has no such file or cannot be reached,
    a web page came instead of a file, the length or checksum is wrong, or the disk is full.
    """
    _check_url(url, allow_local_http)
    path = _cache_path(url, cache_dir)
    if not _is_cached(path):
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with locks.exclusive(path.parent / '.lock', byte=int(path.name[:8], 16)):
            if not _is_cached(path):
                _download(url, path, sha256, progress, timeout_s, allow_local_http)
    found, stored = sha256_of(path), _checksum(path).read_text().split(' ')[0]
    if found != stored:
        raise UserError(f'{path} was damaged after its download: SHA-256 {found}, expected {stored}. Delete it and try again.')
    if sha256 is not None and found != sha256.lower():
        raise UserError(f'{path} has SHA-256 {found}, expected {sha256}. Delete it to download it again from {url}')
    return path


def _download(url: str, path: Path, sha256: str | None, progress: bool, timeout_s: float, allow_local_http: bool) -> None:
    part = _part(path)
    pauses_s, most_bytes = list(_PAUSES_S), _size(part)
    with tqdm(desc=path.name[17:], unit='B', unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
        while True:
            try:
                _attempt(url, path, bar, timeout_s, allow_local_http)
                break
            except _Broken as err:
                if _size(part) > most_bytes:
                    pauses_s, most_bytes = list(_PAUSES_S), _size(part)
                if not pauses_s:
                    raise UserError(
                        f'cannot download {url}: {err}. Check the network (behind a proxy, set https_proxy) and try again: '
                        f'{_size(part)} bytes are kept for that. Or get the file by other means and pass its path.'
                    ) from err
                time.sleep(pauses_s.pop(0))
    digest = sha256_of(part)
    if sha256 is not None and digest != sha256.lower():
        part.unlink()
        raise UserError(f'{url} has SHA-256 {digest}, expected {sha256}. Nothing was kept; check the URL and the checksum.')
    with _disk_errors(path):
        # First the checksum, then the file: what has its final name has a checksum.
        with atomic_write(_checksum(path)) as tmp:
            tmp.write_text(f'{digest}  {path.name}\n')
        os.replace(part, path)
        _validator(path).unlink(missing_ok=True)


def _attempt(url: str, path: Path, bar: tqdm, timeout_s: float, allow_local_http: bool) -> None:
    """Bring the rest of the file into its `.part`. Raises _Broken if another attempt makes sense."""
    part, validator = _part(path), _validator(path)
    headers = {'User-Agent': 'm2m_stylegan'}
    offset = _size(part) if validator.exists() else 0
    if offset:
        # Without a validator the server could have replaced the file, and the result would be a mixture.
        headers |= {'Range': f'bytes={offset}-', 'If-Range': validator.read_text()}
    try:
        response = _open(urllib.request.Request(url, headers=headers), timeout_s, allow_local_http)
    except urllib.error.HTTPError as err:
        err.close()
        if err.code == 416:  # the server's file is not longer than what is here, so this is not its beginning
            part.unlink()
        elif err.code not in (408, 429) and err.code < 500:
            raise UserError(f'{url}: the server answers {err.code} {err.reason}. Check the URL, or pass the path of a file.') from err
        raise _Broken(f'the server answers {err.code} {err.reason}') from err
    with response, _disk_errors(part):
        if response.status == 206 and not _continues(response.headers, offset, validator):
            part.unlink()
            raise _Broken('the server sent another part than asked for')
        if response.status != 206:
            offset = 0
            part.write_bytes(b'')
            _store_validator(validator, response.headers)
        length = response.headers.get('Content-Length')
        total = offset + int(length) if length else None
        bar.reset(total)
        bar.update(offset)
        with part.open('ab') as f:
            for chunk in _chunks(response):
                f.write(chunk)
                bar.update(len(chunk))
        if total is not None and _size(part) != total:
            raise _Broken(f'the connection ended after {_size(part)} of {total} bytes')


def _open(request: urllib.request.Request, timeout_s: float, allow_local_http: bool) -> http.client.HTTPResponse:
    with _network_errors():
        response = urllib.request.build_opener(_CheckedRedirects(allow_local_http)).open(request, timeout=timeout_s)
        start = response.peek(64).lstrip().lower()
    if 'text/html' in response.headers.get('Content-Type', '') or start.startswith((b'<!doctype html', b'<html')):
        response.close()
        raise UserError(f'{request.full_url} is a web page, not a file. Open it in a browser and copy the link of the download.')
    return response


class _CheckedRedirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, allow_local_http: bool):
        self.allow_local_http = allow_local_http

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_url(newurl, self.allow_local_http, f'{req.full_url} redirects to ')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Broken(Exception):
    pass


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as err:
        raise _Broken(str(getattr(err, 'reason', None) or err or type(err).__name__)) from err


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise UserError(f'cannot write {path}: {err.strerror}. Make room there, or set M2M_CACHE_DIR.') from err


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        with _network_errors():
            chunk = response.read1(_CHUNK_BYTES)
        if not chunk:
            return
        yield chunk


def _continues(headers: http.client.HTTPMessage, offset: int, validator: Path) -> bool:
    # The validator is compared again, because some servers honour Range and overlook If-Range.
    found = re.match(r'bytes (\d+)-', headers.get('Content-Range', ''))
    same = validator.read_text() in (headers.get('ETag'), headers.get('Last-Modified')) or not headers.get('ETag')
    return found is not None and int(found[1]) == offset > 0 and same


def _store_validator(validator: Path, headers: http.client.HTTPMessage) -> None:
    validator.unlink(missing_ok=True)
    etag = headers.get('ETag', '')
    text = etag if etag.startswith('"') else headers.get('Last-Modified')  # RFC 9110: weak tags do not serve for ranges
    if text:
        with atomic_write(validator) as tmp:
            tmp.write_text(text)


def _check_url(url: str, allow_local_http: bool, prefix: str = '') -> None:
    try:
        if re.search(r'[^!-~]', url):
            raise ValueError('it holds characters that must be percent-encoded')
        parts = urllib.parse.urlsplit(url)
        scheme, host, _ = parts.scheme, parts.hostname, parts.port
    except ValueError as err:
        raise UserError(f'{prefix}{url!r} is not a URL: {err}') from err
    local = allow_local_http and scheme == 'http' and host in _LOCAL_HOSTS
    if not host or (scheme != 'https' and not local):
        raise UserError(f'{prefix}{url}: only https:// is accepted. For a file on this machine pass its path.')


def _cache_path(url: str, cache_dir: str | os.PathLike | None) -> Path:
    cache_dir = cache_dir or default_cache_dir()
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit('/', 1)[-1]
    name = re.sub(r'[^A-Za-z0-9._-]', '_', name)[-100:] or 'download'
    return Path(cache_dir) / f'{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}'


def _is_cached(path: Path) -> bool:
    return path.exists() and _checksum(path).exists()


def _checksum(path: Path) -> Path:
    return path.with_name(f'{path.name}.sha256')


def _part(path: Path) -> Path:
    return path.with_name(f'{path.name}.part')


def _validator(path: Path) -> Path:
    return path.with_name(f'{path.name}.part.validator')


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _existing(path: Path, complaint: str) -> Path:
    if not path.is_file():
        raise UserError(f'{path}: {complaint}')
    return path
