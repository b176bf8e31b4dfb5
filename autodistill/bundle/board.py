"""A student on a board, or on another machine without containers: a systemd unit."""

from __future__ import annotations

import configparser
import io
import shlex

from autodistill.bundle.exported import Exported
from autodistill.bundle.servers import Server, resources_of


def folder_of(exported: Exported) -> str:
    """Return the folder in which the unit expects the bundle."""
    return f"/opt/{exported.name}"


def key_of(exported: Exported) -> str:
    """Return the file in which the unit expects the clients' key. Only root can read it."""
    return f"/etc/{exported.name}/api_key"


def _word(word: str, exported: Exported) -> str:
    """Return an argument with systemd's special characters escaped. `%d` is systemd's folder of credentials."""
    plain = word.replace("%", "%%").replace("$", "$$")
    return plain.replace("{folder}", folder_of(exported)).replace("{key}", "%d/api_key")


def unit(exported: Exported, server: Server) -> str:
    """Return the unit: its own user, nothing writable, the promised memory as limit, and a restart after each death."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # systemd tells capitals from small letters
    words = [_word(word, exported) for word in server.board_arguments]
    service = {
        "DynamicUser": "yes",
        "ExecStart": shlex.join([server.program, *words]),
    }
    if server.key_variable:
        service["EnvironmentFile"] = f"{key_of(exported)}.env"
    else:
        service["LoadCredential"] = f"api_key:{key_of(exported)}"
    service |= {
        "Restart": "always",
        "RestartSec": "2",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
    }
    limit = resources_of(exported).limit_bytes
    if limit is not None:
        service |= {"MemoryMax": str(limit), "MemorySwapMax": "0"}
    parser["Unit"] = {"Description": f"The student {exported.name}", "After": "network.target"}
    parser["Service"] = service
    parser["Install"] = {"WantedBy": "multi-user.target"}
    text = io.StringIO()
    parser.write(text, space_around_delimiters=False)
    return text.getvalue().rstrip("\n") + "\n"
