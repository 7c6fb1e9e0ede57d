"""A process that has imported what programs need, and forks for each of them: a fresh one for a fraction of the cost.

with Forked("import torch, transformers", HF_HOME=home) as process:
    done = process.run("import sys; print(sys.argv[1])", "x", cwd=folder)
assert (done.returncode, done.stdout) == (0, "x\\n")
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


FORKS = """
for line in sys.stdin:
    script, arguments, folder, out = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open(f"{out}/{number}", os.O_CREAT | os.O_WRONLY), number)
    sys.argv, code = ["-c", *arguments], 0
    try:
        exec(script, {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        code = traceback.print_exc() or 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
"""


class Forked:
    """What programs are run with.

    Args:
        imports (`str`): what is run once, before the programs.
        environment: variables of the process, and no others than these and one thread.
    """

    def __init__(self, imports: str, **environment):
        command = [sys.executable, "-c", f"import json, os, sys, traceback\n{imports}\n{FORKS}"]
        environment = {name: str(value) for name, value in environment.items()} | {"PATH": "", "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def run(self, script: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
        """Runs a program in a folder."""
        with tempfile.TemporaryDirectory() as out:
            asked = [script, list(map(str, arguments)), str(cwd), out]
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            texts = [(Path(out) / name).read_text(encoding="utf-8") for name in ("1", "2")]
        return subprocess.CompletedProcess(script, code, *texts)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.wait(30)
