import hashlib
import http.server
import multiprocessing
import os
import re
import signal
import threading
from pathlib import Path

import pytest

from m2m_stylegan import downloads
from m2m_stylegan.errors import UserError

CONTENT = bytes(range(256)) * 2000  # 512 kB: several chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()
fork = multiprocessing.get_context('fork')


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path but the special ones; `script` holds what to do with the next requests, one entry each."""

    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.content = CONTENT
        self.etag = '"one"'
        self.last_modified = None
        self.headers = {}
        self.script = []
        self.stall = threading.Event()
        self.requests = []

    def url(self, path='/net.pkl'):
        return f'http://127.0.0.1:{self.server_port}{path}'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        action = server.script.pop(0) if server.script else 'serve'
        if isinstance(action, int):
            return self.send_error(action)
        if action.startswith('redirect '):
            self.send_response(302)
            self.send_header('Location', action.split(' ')[1])
            return self.end_headers()
        data, start = server.content, 0
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        if asked and (self.headers.get('If-Range') in (server.etag, server.last_modified) or action == 'overlook If-Range'):
            start = int(asked[1])
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206)
            shown = start + 1 if action == 'wrong range' else start
            self.send_header('Content-Range', f'bytes {shown}-{len(data) - 1}/{len(data)}')
        else:
            self.send_response(200)
        for name, value in {'ETag': server.etag, 'Last-Modified': server.last_modified, **server.headers}.items():
            if value is not None:
                self.send_header(name, value)
        if action != 'no length':
            self.send_header('Content-Length', str(len(data) - start))
        self.end_headers()
        # 'break N': N bytes of the body, then the connection ends; 'stall N': then silence.
        stop = start + int(action.split(' ')[1]) if action.startswith(('break', 'stall')) else len(data)
        self.wfile.write(data[start:stop])
        if action.startswith('stall'):
            server.stall.wait()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.stall.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, '_PAUSES_S', (0, 0))
    monkeypatch.setenv('M2M_CACHE_DIR', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def fetch(url, **kwargs):
    return downloads.fetch(url, **{'progress': False, 'allow_local_http': True, 'timeout_s': 5, **kwargs})


def visible(cache_dir):
    return sorted(p.name for p in cache_dir.iterdir() if not p.name.startswith('.'))


def test_a_file_is_downloaded_once_and_carries_its_checksum(server, cache_dir, capsys):
    path = fetch(server.url(), progress=True)
    assert path.read_bytes() == CONTENT and path.parent == cache_dir and path.name.endswith('-net.pkl')
    assert visible(cache_dir) == [path.name, f'{path.name}.sha256']
    assert Path(f'{path}.sha256').read_text() == f'{SHA256}  {path.name}\n'  # what sha256sum writes
    assert fetch(server.url(), sha256=SHA256.upper()) == path
    assert len(server.requests) == 1
    assert 'net.pkl' in capsys.readouterr().err


def test_files_of_the_same_name_do_not_meet(server, cache_dir, tmp_path):
    first = fetch(server.url('/a/net.pkl'))
    server.content = b'other'
    second = fetch(server.url('/b/net.pkl'))
    assert (first.read_bytes(), second.read_bytes()) == (CONTENT, b'other')
    assert fetch(server.url('/a/net.pkl'), cache_dir=tmp_path / 'elsewhere').parent == tmp_path / 'elsewhere'


@pytest.mark.parametrize('path', ['/..%2F..%2Fetc%2Fpasswd', '/', '/a b'.replace(' ', '%20'), '/%00%ff', '/' + 'x' * 300, '/q?file=net.pkl'])
def test_hostile_names_stay_in_the_cache(server, cache_dir, path):
    found = fetch(server.url(path))
    assert found.parent == cache_dir and re.fullmatch(r'[0-9a-f]{16}-[A-Za-z0-9._-]{1,100}', found.name)


# Broken connections


def test_a_broken_connection_goes_on_where_it_stopped(server, cache_dir):
    server.script = ['break 200000', 'break 100000']
    assert fetch(server.url(), sha256=SHA256).read_bytes() == CONTENT
    assert [r.get('Range') for r in server.requests] == [None, 'bytes=200000-', 'bytes=300000-']
    assert [r.get('If-Range') for r in server.requests] == [None, '"one"', '"one"']


def test_the_next_call_goes_on_too(server, cache_dir):
    server.script = ['break 200000', *[503] * 3]
    with pytest.raises(UserError, match=r'503.*200000 bytes are kept'):
        fetch(server.url())
    assert not [name for name in visible(cache_dir) if name.endswith(('net.pkl', 'sha256'))]
    path = fetch(server.url())
    assert path.read_bytes() == CONTENT and server.requests[-1]['Range'] == 'bytes=200000-'
    assert visible(cache_dir) == [path.name, f'{path.name}.sha256']


def test_progress_renews_the_attempts(server, cache_dir):
    server.script = ['break 1000', 500] * 6
    assert fetch(server.url()).read_bytes() == CONTENT


def test_silence_ends_an_attempt(server, cache_dir):
    server.script = ['stall 200000']
    assert fetch(server.url(), timeout_s=0.2).read_bytes() == CONTENT
    assert server.requests[-1]['Range'] == 'bytes=200000-'


def test_a_server_that_never_gets_further_is_given_up(server, cache_dir):
    server.script = ['break 1000', 'wrong range'] * 10
    with pytest.raises(UserError, match='cannot download'):
        fetch(server.url())


def test_a_file_changed_on_the_server_is_fetched_whole(server, cache_dir):
    server.script = ['break 200000', 503, 503, 503]
    with pytest.raises(UserError):
        fetch(server.url())
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert fetch(server.url()).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize('action', ['overlook If-Range', 'wrong range'])
def test_a_wrong_part_is_never_appended(server, cache_dir, action):
    server.script = ['break 200000', 503, 503, 503]
    with pytest.raises(UserError):
        fetch(server.url())
    if action == 'overlook If-Range':
        server.content, server.etag = CONTENT[::-1], '"two"'
    server.script = [action]
    assert fetch(server.url()).read_bytes() == server.content
    assert 'Range' in server.requests[-2] and 'Range' not in server.requests[-1]


@pytest.mark.parametrize(
    'etag, last_modified, resumes',
    [('W/"weak"', None, False), (None, None, False), (None, 'Mon, 01 Jan 2024 00:00:00 GMT', True)],
)
def test_only_a_strong_validator_allows_to_resume(server, cache_dir, etag, last_modified, resumes):
    server.etag, server.last_modified = etag, last_modified
    server.script = ['break 200000']
    assert fetch(server.url()).read_bytes() == CONTENT
    assert ('Range' in server.requests[-1]) == resumes


def test_a_part_longer_than_the_file_is_dropped(server, cache_dir):
    server.script = ['break 200000', 503, 503, 503]
    with pytest.raises(UserError):
        fetch(server.url())
    server.content = b'short'
    assert fetch(server.url()).read_bytes() == b'short'


def test_a_server_that_tells_no_length(server, cache_dir):
    server.script = ['no length']
    assert fetch(server.url()).read_bytes() == CONTENT


def test_content_length_mismatch(server, cache_dir):
    server.etag = None
    server.script = ['break 5', 'break 5', 'break 5', 'break 5']
    with pytest.raises(UserError, match=r'the connection ended after 5 of 512000 bytes.*pass its path'):
        fetch(server.url())


def test_no_network(cache_dir, server):
    server.shutdown()
    server.socket.close()
    with pytest.raises(UserError, match=r'(?s)cannot download .*refused.*https_proxy'):
        fetch(server.url())


def kill_in_mid_file(url):
    chunks = downloads._chunks

    def some(response):
        yield next(chunks(response))
        os.kill(os.getpid(), signal.SIGKILL)

    downloads._chunks = some
    fetch(url)


def test_resume_after_a_kill(server, cache_dir):
    process = fork.Process(target=kill_in_mid_file, args=(server.url(),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert fetch(server.url()).read_bytes() == CONTENT


def test_processes_download_once(server, cache_dir):
    processes = [fork.Process(target=fetch, args=(server.url(),)) for _ in range(3)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0, 0, 0] and len(server.requests) == 1


# Refusals


@pytest.mark.parametrize('code', [404, 403, 410])
def test_refused_by_the_server_at_once(server, cache_dir, code):
    server.script = [code]
    with pytest.raises(UserError, match=rf'net\.pkl: the server answers {code} .*Check the URL'):
        fetch(server.url())
    assert len(server.requests) == 1


@pytest.mark.parametrize('code', [429, 500, 503])
def test_passing_trouble_is_tried_again(server, cache_dir, code):
    server.script = [code, code]
    assert fetch(server.url()).read_bytes() == CONTENT


@pytest.mark.parametrize('by', ['type', 'content'])
def test_a_web_page_is_no_file(server, cache_dir, by):
    if by == 'type':
        server.headers = {'Content-Type': 'text/html; charset=utf-8'}
    else:
        server.content = b'\n <!DOCTYPE HTML><html>Virus scan warning</html>'
    with pytest.raises(UserError, match='is a web page, not a file'):
        fetch(server.url())
    assert visible(cache_dir) == []


def test_wrong_checksum(server, cache_dir):
    with pytest.raises(UserError, match=f'has SHA-256 {SHA256}, expected {"0" * 64}. Nothing was kept'):
        fetch(server.url(), sha256='0' * 64)
    assert not [name for name in visible(cache_dir) if not name.endswith('.validator')]
    path = fetch(server.url())
    with pytest.raises(UserError, match=f'{path} has SHA-256 {SHA256}, expected {"0" * 64}'):
        fetch(server.url(), sha256='0' * 64)


def test_damage_after_the_download(server, cache_dir):
    path = fetch(server.url())
    path.write_bytes(b'x' + CONTENT[1:])
    with pytest.raises(UserError, match=f'{path} was damaged after its download.*Delete it'):
        fetch(server.url())
    path.unlink()
    assert fetch(server.url()).read_bytes() == CONTENT


@pytest.mark.parametrize(
    'url',
    ['http://example.com/net.pkl', 'http://localhost@example.com/net.pkl', 'file:///etc/passwd', 'ftp://example.com/a', 'data:,x', 'https:///a'],
)
def test_only_https(cache_dir, url):
    with pytest.raises(UserError, match='only https:// is accepted'):
        fetch(url)


def test_local_http_needs_the_option(server, cache_dir):
    with pytest.raises(UserError, match='only https:// is accepted'):
        downloads.fetch(server.url())
    assert server.requests == []


@pytest.mark.parametrize('url', ['https://exa mple.com/', 'https://example.com/ä.pkl', 'https://[::1/a', 'https://a:port/b', 'https://a/\n'])
def test_not_a_url(cache_dir, url):
    with pytest.raises(UserError, match='is not a URL'):
        fetch(url)


@pytest.mark.parametrize('target', ['http://example.com/net.pkl', 'ftp://127.0.0.1/net.pkl', 'file:///etc/passwd'])
def test_redirects_must_stay_secure(server, cache_dir, target):
    server.script = [f'redirect {target}']
    with pytest.raises(UserError, match=rf'net\.pkl.* redirects to .*{target}.* only https|302 .*{target}.* not allowed'):
        fetch(server.url())


def test_redirects_are_followed(server, cache_dir):
    server.script = ['redirect /elsewhere', 'break 200000', 'redirect /elsewhere']
    assert fetch(server.url()).read_bytes() == CONTENT
    assert server.requests[-1]['Range'] == 'bytes=200000-'


def test_cache_dir_that_cannot_be_made(server, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot write .*M2M_CACHE_DIR'):
        fetch(server.url(), cache_dir=tmp_path / 'file')


def test_full_disk_keeps_what_came(server, cache_dir, monkeypatch):
    write = downloads._chunks

    def full(response):
        yield next(write(response))
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(downloads, '_chunks', full)
        with pytest.raises(UserError, match=r'cannot write .*No space left on device. Make room'):
            fetch(server.url())
    assert fetch(server.url()).read_bytes() == CONTENT and 'Range' in server.requests[-1]


# Names


def test_resolve(server, cache_dir, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(downloads, 'fetch', lambda url, cache_dir=None: asked.append((url, cache_dir)) or Path('fetched'))
    assert downloads.resolve('ffhq256') == downloads.resolve('https://example.com/x.pkl', tmp_path) == Path('fetched')
    assert asked == [(downloads.OFFICIAL_PICKLES['ffhq256'], None), ('https://example.com/x.pkl', tmp_path)]
    (tmp_path / 'net.pkl').write_bytes(b'')
    assert downloads.resolve(tmp_path / 'net.pkl') == downloads.resolve(str(tmp_path / 'net.pkl')) == tmp_path / 'net.pkl'
    for bad in (tmp_path, tmp_path / 'missing.pkl', 'ffhq2048', ''):
        with pytest.raises(UserError, match=r'https:// URL, or one of the short names demo, ffhq256, ffhq512, ffhq1024, celeb'):
            downloads.resolve(bad)


def test_demo_pickle_lies_in_the_package(monkeypatch, tmp_path):
    assert Path(downloads.__file__).parent / 'assets' / 'demo.pkl' == downloads.DEMO_PICKLE
    monkeypatch.setattr(downloads, 'DEMO_PICKLE', tmp_path / 'demo.pkl')
    with pytest.raises(UserError, match='lacks its demo pickle'):
        downloads.resolve('demo')
    (tmp_path / 'demo.pkl').write_bytes(b'')
    assert downloads.resolve('demo') == tmp_path / 'demo.pkl'


def test_official_names():
    folder = 'https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/transfer-learning-source-nets/'
    assert list(downloads.OFFICIAL_PICKLES) == ['ffhq256', 'ffhq512', 'ffhq1024', 'celebahq256', 'lsundog256']
    for name, url in downloads.OFFICIAL_PICKLES.items():
        dataset, size = re.fullmatch(r'([a-z]+?)(\d+)', name).groups()
        assert url.startswith(f'{folder}{dataset}-res{size}-') and url.endswith('.pkl')


def test_default_cache_dir(monkeypatch):
    monkeypatch.delenv('M2M_CACHE_DIR', raising=False)
    monkeypatch.setenv('HOME', '/home/somebody')
    assert downloads._cache_path('https://example.com/a.pkl', None).parent == Path('/home/somebody/.cache/m2m_stylegan')
