"""A Slurm cluster of two nodes on this machine, for tests; needs slurm-wlm, munge and root."""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=20
MpiDefault=none
SlurmctldParameters=enable_configless
SchedulerParameters=requeue_setup_env_fail,sched_interval=2,batch_sched_delay=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def missing() -> str:
    """Why there can be no cluster here, or ""."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)"
    return "" if os.getuid() == 0 else "needs root"


@contextlib.contextmanager
def cluster(folder: pathlib.Path):
    """Runs the daemons; yields the environment in which Slurm's commands find them."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=ports, folder=folder))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "-F", "--force", f"--key-file={folder}/munge.key"]
    munge += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    munge += [f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"]
    daemons = [munge, ["slurmctld", "-D", "-c"]]
    daemons += [["slurmd", "-D", "-N", name] for name in ("n1", "n2")]
    processes = []
    try:
        for number, command in enumerate(daemons):
            with open(folder / f"daemon-{number}.log", "w") as log:
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            time.sleep(1)
        for _ in range(60):
            state = output(["sinfo", "-h", "-o", "%T %D"], env)
            if "idle 2" in state:
                break
            time.sleep(0.5)
        else:
            logs = [p.read_text()[-1500:] for p in sorted(folder.glob("daemon-*.log"))]
            raise RuntimeError(f"the nodes do not come up: {state}\n" + "\n".join(logs))
        yield env
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            output(["scancel", "--full", "--user=root", "--signal=KILL"], env)
            output(["scancel", "--user=root"], env)
            time.sleep(2)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            process.kill()


def output(command, env) -> str:
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    return result.stdout + result.stderr
