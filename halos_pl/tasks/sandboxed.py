"""The process in which :mod:`halos_pl.tasks.sandbox` runs a program; imports nothing of halos_pl.

Words: the descriptor for reports, then ``limit=value``. Standard input: a token, and from the second line the program.
Reports: ``ready`` once the isolation is complete (otherwise the reason), then the name of the program's exception, or
the token if it has run to its end. While the program runs, no Python object contains the token: it waits in the output
buffer of a file of the C library, which is written when this process ends in the ordinary way. That happens only after
the program has run to its end; every other way out is immediate.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442  # on every architecture
READ_ONLY, NO_SETUID, NO_DEVICES = 1, 2, 4
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, FILTER = 22, 24, 38, 2
#: Places for the working folder; what was in them is hidden.
PLACES = ("/tmp", "/var/tmp", "/mnt", "/media", "/srv")

#: Numbers of system calls that are the same on every architecture: io_uring_setup, open_tree, move_mount, fsopen,
#: fsconfig, fsmount, fspick, pidfd_open, mount_setattr.
COMMON = (425, 428, 429, 430, 431, 432, 433, 434, 442)
#: By architecture: its audit number, clone, and the numbers of socket, ptrace, mount, umount2, pivot_root, chroot,
#: unshare, setns, execve, execveat, process_vm_writev, bpf, keyctl, add_key, request_key, perf_event_open, userfaultfd,
#: memfd_create, shmget, msgget, mq_open; on x86-64 also fork and vfork.
CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        (41, 101, 165, 166, 155, 161, 272, 308, 59, 322, 311, 321, 250, 248, 249, 298, 323, 319, 29, 68, 240, 57, 58),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (198, 117, 40, 39, 41, 51, 97, 268, 221, 281, 271, 280, 219, 217, 218, 241, 282, 279, 194, 186, 180),
    ),
}
CLONE3, CLONE_THREAD, X32 = 435, 0x10000, 0x40000000
EPERM, ENOSYS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, result: int) -> None:
    """Refuses a failed call of libc.

    Raises:
        OSError: naming the call.
    """
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def place() -> str:
    """A folder to hide below the working folder: none that contains Python or its packages."""
    used = [os.path.realpath(path) for path in (*sys.path, sys.prefix, sys.base_prefix, sys.executable) if path]
    for folder in PLACES:
        if os.path.isdir(folder) and not any((path + "/").startswith(folder + "/") for path in used):
            return folder
    raise OSError(f"each of {', '.join(PLACES)} is missing or contains Python's packages")


def isolate_files(disk: int) -> None:
    """Makes all mounts read-only and without devices, hides /proc, and enters an empty folder in memory."""
    attributes = struct.pack("QQQQ", READ_ONLY | NO_SETUID | NO_DEVICES, 0, 0, 0)
    call("mount_setattr", libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, len(attributes)))
    folder = place()
    for path, options in ((folder, f"size={disk},mode=1777"), ("/proc", "size=4k,ro")):
        call(f"mount {path}", libc.mount(b"none", path.encode(), b"tmpfs", NO_SETUID | NO_DEVICES, options.encode()))
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)


def limit(cpu: int, memory: int, disk: int) -> None:
    """Limits the process's time, memory, files and threads."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (disk, disk))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (32, 32))  # root is exempt; see seccomp


def drop_capabilities() -> None:
    """Gives up all capabilities for good."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # past the last one
    call("prctl", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    call("capset", libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))


def forbid_calls() -> None:
    """Lets system calls fail that open sockets, start processes or undo the isolation; threads are allowed."""
    machine = platform.machine()
    if machine not in CALLS:
        raise OSError(f"no list of system calls for {machine}")
    audit, clone, numbers = CALLS[machine]
    load, equal, at_least, has_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    # Each line: operation, jump if true, jump if false, operand.
    lines = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, audit),
        (end, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 0, 1, X32),
        (end, 0, 0, refuse | ENOSYS),
        (equal, 0, 1, CLONE3),  # its flags cannot be read here: libc then uses clone
        (end, 0, 0, refuse | ENOSYS),
    ]
    for number in (*numbers, *COMMON):
        lines += [(equal, 0, 1, number), (end, 0, 0, refuse | EPERM)]
    lines += [
        (equal, 0, 3, clone),
        (load, 0, 0, 16),  # its flags
        (has_bit, 1, 0, CLONE_THREAD),
        (end, 0, 0, refuse | EPERM),
        (end, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HP", len(lines), ctypes.addressof(code))
    call("seccomp", libc.prctl(PR_SET_SECCOMP, FILTER, ctypes.c_char_p(program), 0, 0))


def written_at_the_end(descriptor: int, line: bytes) -> None:
    """Leaves a line to the C library, which writes it to the descriptor when this process ends in the ordinary way.

    Raises:
        OSError: naming the call that failed.
    """
    libc.fdopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(libc.fdopen(descriptor, b"w"))
    if not file or libc.fputs(line, file) < 0:
        call("fdopen", -1)


def isolate() -> int:
    """Isolates this process, and leaves the token for its end.

    Returns:
        The descriptor for reports.
    """
    descriptor, limits = int(sys.argv[1]), dict(word.split("=") for word in sys.argv[2:])
    token = b""
    while not token.endswith(b"\n"):  # without a buffer, which would keep it
        token += os.read(0, 1)
    try:
        written_at_the_end(descriptor, token)
        disk = int(limits["disk"])
        isolate_files(disk)
        limit(int(limits["cpu"]), int(limits["memory"]), disk)
        drop_capabilities()
        forbid_calls()
    except OSError as error:
        os.write(descriptor, f"{error.strerror or error}\n".encode())
        os._exit(1)
    return descriptor


def main() -> None:
    """Isolates this process, then runs the program; returns only if the program has run to its end."""
    descriptor = isolate()
    write, leave = os.write, os._exit  # the program may replace those of the module
    program = sys.stdin.buffer.read()
    os.dup2(1, 2)
    write(descriptor, b"ready\n")
    sys.argv = ["program"]
    try:
        exec(compile(program, "program.py", "exec"), {})
    except BaseException as error:
        try:
            write(descriptor, f"{type(error).__name__}\n".encode())
        finally:
            leave(1)


if __name__ == "__main__":
    main()
