"""nginx and Caddy with what docs/reverse-proxy.md says, word for word but for addresses and certificates."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.certificate import NAME, make_certificate
from tests.markdown import ROOT, blocks_of
from tests.procs.waiting import free_port, wait_until

PAGE = ROOT / "docs/reverse-proxy.md"

_NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{text}
}}
"""
_CADDY = """
{{
    admin off
    auto_https disable_redirects
    skip_install_trust
}}
{text}
"""


def text_of(name: str) -> str:
    """The configuration of that proxy, as it stands on the page."""
    (block,) = [block for block in blocks_of(PAGE) if block.language == {"nginx": "nginx", "caddy": "caddyfile"}[name]]
    return block.text


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """The text with other words; each has to be in it."""
    for before, after in pairs:
        assert before in text, before
        text = text.replace(before, after)
    return text


@dataclass
class Proxy:
    """A proxy that runs, with TLS on 127.0.0.1:`port`. `certificate`: which proves who it is."""

    name: str
    port: int
    certificate: Path
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        """Let it end. Idempotent."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30.0)


def start_proxy(name: str, folder: Path, upstream: int, *changes: tuple[str, str]) -> Proxy:
    """Start it in front of the port `upstream`, with those changes to the page's text. Skips the test where it is not
    installed."""
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    certificate, key = make_certificate(folder)
    port = free_port()
    text = replaced(text_of(name), ("127.0.0.1:8000", f"127.0.0.1:{upstream}"), *changes)
    if name == "nginx":
        text = replaced(
            text,
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("/etc/ssl/llm.pem", str(certificate)),
            ("/etc/ssl/llm.key", str(key)),
        )
        file, form = folder / "nginx.conf", _NGINX
        command = [program, "-p", str(folder), "-e", "stderr", "-c", str(file)]
    else:
        opening = f"{NAME}:{port} {{\n    bind 127.0.0.1\n    tls {certificate} {key}\n"
        text = replaced(text, (f"{NAME} {{\n", opening))
        file, form = folder / "Caddyfile", _CADDY
        command = [program, "run", "--adapter", "caddyfile", "--config", str(file)]
    file.write_text(form.format(folder=folder, text=text))
    log = folder / "log"
    home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | home, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    proxy = Proxy(name, port, certificate, process, log)

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        return f":{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text()

    try:
        wait_until(listens, f"{name} listens", 30.0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return proxy
