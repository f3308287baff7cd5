#!/usr/bin/env bash
# huggingface_hub 2.4.0 without hf-xet: a download that its process does not live to finish is not continued by the next one.
# hf_hub_download keeps partial files (*.incomplete) and resumes with a Range request when a connection drops, so a second call
# after a kill is expected to fetch the rest. It fetches everything again: no request has a Range, the partial file is replaced.
# For models of tens of gigabytes that is the whole download. Seen below: a server that stalls after 35 of 40 MiB, the client killed with more
# than 10 MiB on disk, a second client: its request begins at byte 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "huggingface_hub==2.4.0"
"$folder/venv/bin/pip" uninstall --quiet --yes hf-xet
cat >"$folder/show.py" <<'PYTHON'
import hashlib, os, re, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DATA, STALL = os.urandom(40 << 20), 35 << 20
ETAG = hashlib.sha256(DATA).hexdigest()
starts, stalled = [], threading.Event()
release = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(0, head=True)

    def do_GET(self):
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match.group(1)) if match else 0
        if self.path.endswith("weights.bin"):
            starts.append(start)
        self.answer(start)

    def answer(self, start, head=False):
        self.send_response(206 if start else 200)
        for name, value in {
            "Content-Length": len(DATA) - start, "ETag": f'"{ETAG}"', "X-Repo-Commit": "1" * 40, "Accept-Ranges": "bytes",
            **({"Content-Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"} if start else {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if head:
            return
        body = DATA[start:]
        if not release.is_set():
            self.wfile.write(body[:STALL])
            self.wfile.flush()
            stalled.set()
            release.wait()
            return
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
cache = Path(sys.argv[1])
environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_CACHE": str(cache)}
program = "from huggingface_hub import hf_hub_download as load; print(load('a/b', 'weights.bin'))"
first = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
assert stalled.wait(60)
for _ in range(200):
    partial = [path.stat().st_size for path in cache.rglob("*.incomplete")]
    if partial and partial[0] > 10 << 20:
        break
    time.sleep(0.05)
print("partial file when the first process is killed:", partial)
first.send_signal(signal.SIGKILL)
first.wait()
release.set()
subprocess.run([sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("requests began at byte:", starts)
assert partial and partial[0] > 10 << 20, "nothing was kept of the first download"
assert starts == [0, 0], "the second process resumes now"
print("as described: the second process fetched everything again")
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder/cache"
