"""Run one program of a stranger's, closed in as far as the system allows. Run as a script, without our package.

    python -I _sandbox.py < JOB

The job is a JSON object: the program, a token, the folder, and limits. The program runs in a child of this process.
Only when its last line has been run does the child send the token back, so a program that ends early, in whatever way
and saying whatever it likes, has not passed. Prints one JSON object: what came back, how the child ended, what held it.

What holds it: limits by setrlimit everywhere; on Linux the user `nobody` in the place of root, namespaces of its own
for network and processes (`unshare`), and Landlock, which keeps all writing in the folder and TCP off. Which of these
the system allowed is in the answer.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NOBODY = 65534
ANSWER_BYTES = 2000

# linux/sched.h, linux/prctl.h, linux/capability.h and linux/landlock.h; numbers are the same on all architectures.
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 8, 36, 38
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULESET_VERSION = 1
BENEATH = 1
WRITE_FILE, MAKE_CHAR, MAKE_BLOCK = 1 << 1, 1 << 6, 1 << 11
# From which version of Landlock which rights of writing can be taken away: remove and make, then refer, then truncate.
WRITING = {1: WRITE_FILE | 0x1FF0, 2: 1 << 13, 3: 1 << 14}
TCP, TCP_VERSION = 3, 4
SIGNALS_AND_SOCKETS, SCOPE_VERSION = 3, 6


class Refused(Exception):
    """The program cannot be run safely here; the message says why."""


def main() -> None:
    job = json.load(sys.stdin)
    try:
        answer = supervise(job)
    except Refused as reason:
        answer = {"refused": str(reason)}
    sys.stdout.write(json.dumps(answer) + "\n")


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    linux = sys.platform.startswith("linux")
    held = {"network": "on", "writes": "wherever the user may", "processes": "one session", "user": "the same"}
    if os.geteuid() == 0:
        check_other_user(job["folder"])
    if linux:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        held |= own_namespaces()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run(job, writing, linux)
    os.close(writing)
    deadline = time.monotonic() + job["seconds"]
    said, in_time = read_until(reading, deadline)
    ended = end(child, deadline if in_time else 0.0)
    end_descendants()
    first, _, rest = said.decode(errors="replace").partition("\n")
    with suppress(ValueError):
        held |= json.loads(first)
    if held.pop("tcp", None) and held["network"] == "on":
        held["network"] = "without TCP"
    return {"said": rest.strip(), "in_time": in_time, "ended": ended, "held": held}


def read_until(descriptor: int, deadline: float) -> tuple[bytes, bool]:
    """What the child sends, cut: two lines, or what there is when it ends or time is up."""
    said = b""
    while len(said) < ANSWER_BYTES and said.count(b"\n") < 2:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return said, False
        piece = os.read(descriptor, ANSWER_BYTES - len(said))
        if not piece:
            break
        said += piece
    return said, True


def end(child: int, deadline: float) -> int:
    """The child's exit code, minus the signal that ended it; after the deadline it is killed."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_descendants() -> None:
    """Whatever the program started: orphans are this process's. They are stopped first, for they may still fork."""
    while True:
        stopped: set[int] = set()
        while new := descendants(os.getpid()) - stopped:
            send_to(new, signal.SIGSTOP)
            stopped |= new
        send_to(stopped, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def send_to(pids: set[int], number: int) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, number)


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found.update(map(int, (thread / "children").read_text().split()))
    return found.union(*map(descendants, found))


# In the child.


def run(job: dict[str, Any], writing: int, linux: bool) -> None:
    """Never returns."""
    send, leave, token = os.write, os._exit, f"{job['token']}\n".encode()
    try:
        held = confine(job, linux)
        send(writing, json.dumps(held).encode() + b"\n")
        silence(writing)
        exec(compile(job["program"], "program.py", "exec"), {})
        send(writing, token)
    except BaseException as error:
        with suppress(BaseException):
            send(writing, f"{described(error)}\n".encode())
    finally:
        leave(0)


def described(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(": ")


def silence(writing: int) -> None:
    """No input, no output, and no descriptors but the one to answer on."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(3, writing)
    os.closerange(writing + 1, 256)


def confine(job: dict[str, Any], linux: bool) -> dict[str, Any]:
    os.chdir(job["folder"])
    os.umask(0o077)
    held = {}
    keeps = 0
    if os.geteuid() == 0:
        keeps = 0 if can_read(NOBODY) else CAP_DAC_READ_SEARCH
        become(NOBODY)
        held["user"] = "nobody"
    if linux:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        keep_capabilities(keeps)
        held |= keep_writes_in(job["folder"])
    for name, most in job["limits"].items():
        with suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))
    return held


# In the place of root, whose processes cannot be limited in number and who may write anywhere: nobody. Where Python
# lies in a folder that only root can read, nobody is left the one capability of reading.


def check_other_user(folder: str) -> None:
    os.chown(folder, NOBODY, NOBODY)
    if not can_read(NOBODY) and not capabilities() & CAP_DAC_READ_SEARCH:
        raise Refused(
            f"programs are not run as root, and the user nobody cannot read {sys.prefix}. Run as an ordinary user"
        )


def can_read(uid: int) -> bool:
    """Whether another user can read the standard library."""
    os.setegid(uid)
    os.seteuid(uid)
    try:
        return os.access(os.__file__, os.R_OK, effective_ids=True)
    finally:
        os.seteuid(0)
        os.setegid(0)


def capabilities() -> int:
    with suppress(OSError):
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    return 0


def become(uid: int) -> None:
    if sys.platform.startswith("linux"):
        prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def libc(name: str, *arguments: object) -> int:
    """The result of a function of the C library. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    result = int(getattr(library, name)(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def prctl(option: int, value: int) -> None:
    with suppress(OSError):
        libc("prctl", option, *(ctypes.c_ulong(each) for each in (value, 0, 0, 0)))


def own_namespaces() -> dict[str, Any]:
    """No network, and processes that end with the first of them. An ordinary user needs a user namespace for it."""
    flags = CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    for more in (0, CLONE_NEWUSER):
        with suppress(OSError, AttributeError):
            libc("unshare", flags | more)
            return {"network": "off", "processes": "a namespace of their own"}
    return {}


def keep_capabilities(kept: int) -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    with suppress(OSError, AttributeError):
        libc("capset", header, (ctypes.c_uint32 * 6)(kept, kept))


def keep_writes_in(folder: str) -> dict[str, Any]:
    """Landlock: no write outside of the folder, no TCP, no signals and abstract sockets to processes outside."""
    try:
        version = landlock(CREATE_RULESET, None, ctypes.c_size_t(0), RULESET_VERSION)
        writing = sum(rights for since, rights in WRITING.items() if version >= since)
        handled = (ctypes.c_uint64 * 3)(
            writing, TCP if version >= TCP_VERSION else 0, SIGNALS_AND_SOCKETS if version >= SCOPE_VERSION else 0
        )
        size = 24 if version >= SCOPE_VERSION else 16 if version >= TCP_VERSION else 8
        ruleset = landlock(CREATE_RULESET, handled, ctypes.c_size_t(size), 0)
        allow(ruleset, folder, writing & ~(MAKE_CHAR | MAKE_BLOCK))
        allow(ruleset, os.devnull, WRITE_FILE)
        landlock(RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)
    except (OSError, AttributeError):
        return {}
    return {"writes": "its own folder"} | ({"tcp": "off"} if version >= TCP_VERSION else {})


def allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
    landlock(ADD_RULE, ruleset, BENEATH, ctypes.c_char_p(rule), 0)
    os.close(descriptor)


def landlock(number: int, *arguments: object) -> int:
    return libc("syscall", ctypes.c_long(number), *arguments)


if __name__ == "__main__":
    main()
