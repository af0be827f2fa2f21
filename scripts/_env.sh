# shellcheck shell=bash
# Sourced, not run: gives the scripts one virtual environment, .venv in the repository root.
#
#   source scripts/_env.sh
#   jmp_env export,rtx          # afterwards $PYTHON is the environment's python, $ROOT the checkout
#
# JMP_PYTHON names the Python to make it with (default: a python3 of 3.10-3.13 on PATH).
# JMP_SYSTEM_SITE=1 makes it see the packages of that Python: torch and torchvision, which must be
# among them, are kept as they are (a Jetson's, an image's, a CPU build); only what is missing is
# installed.
# pip is used as the user has configured it: no option here chooses where packages come from. Which
# versions, constraints.txt says. What came of it is tried: scripts/try_imports.py.
# Interrupt it at any time: the next run goes on, because the stamp is written last.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"
JMP_NEEDED_GB=8 # .venv with export, rtx, nvcc and dev takes 6.7; pip unpacks beside it

jmp_die() {
  printf 'error: %s\n' "$1" >&2
  shift
  for line in "$@"; do printf '  %s\n' "$line" >&2; done
  exit 2
}

# jmp_step "what" command...: one line, the time it took, and the end of its output if it failed.
jmp_step() {
  local what="$1" start=$SECONDS log
  shift
  log="$(mktemp "${TMPDIR:-/tmp}/jmp_step.XXXXXX")"
  printf '  %-58s ' "$what"
  if "$@" >"$log" 2>&1 </dev/null; then
    printf 'done (%d s)\n' $((SECONDS - start))
    rm -f "$log"
  else
    printf 'FAILED (%d s)\n' $((SECONDS - start))
    # pip's own words for the reason, where it has some, are worth more than a build's traceback
    if grep -q "^ *ERROR: " "$log"; then
      grep "^ *ERROR: " "$log" | sort -u >&2
      sed -n '/^The conflict is caused by/,/^$/p' "$log" >&2
    else
      grep -v "^WARNING: Location" "$log" | tail -n 25 >&2
    fi
    printf '  the whole output: %s\n' "$log" >&2
    return 1
  fi
}

jmp_usable_python() { # is "$1" a Python that can make the environment?
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

jmp_find_python() {
  local candidate
  if [[ -n "${JMP_PYTHON:-}" ]]; then
    "$JMP_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 ||
      jmp_die "JMP_PYTHON=$JMP_PYTHON is not a working Python 3.10 or newer"
    printf '%s\n' "$JMP_PYTHON"
    return
  fi
  for candidate in python3 python3.12 python3.11 python3.13 python3.10; do
    if jmp_usable_python "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  jmp_die "no Python 3.10-3.13 on PATH (python3: $({ python3 --version || echo none; } 2>/dev/null))" \
    "Install one, e.g. apt-get install python3 python3-venv, or name one: JMP_PYTHON=/path/to/python3"
}

jmp_free_gb() { # whole GB free where "$1" lies
  df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }'
}

jmp_make_venv() {
  local base
  if [[ -x "$PYTHON" ]] && "$PYTHON" -m pip --version >/dev/null 2>&1; then
    base="${JMP_PYTHON:-}"
    if [[ -n "$base" && "$("$base" --version 2>&1)" != "$("$PYTHON" --version 2>&1)" ]]; then
      jmp_die "$VENV holds $("$PYTHON" --version), JMP_PYTHON is $("$base" --version 2>&1)" \
        "To make it anew: rm -r '$VENV'"
    fi
    jmp_usable_python "$PYTHON" || [[ -n "$base" ]] ||
      jmp_die "$VENV holds $("$PYTHON" --version), expected 3.10-3.13" "Remove it: rm -r '$VENV'"
    [[ "${JMP_SYSTEM_SITE:-0}" == 0 ]] || jmp_sees_system ||
      jmp_die "JMP_SYSTEM_SITE=1, but $VENV was made without it" "To make it anew: rm -r '$VENV'"
    return
  fi
  base="$(jmp_find_python)" || exit 2
  "$base" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
    jmp_die "$base cannot make virtual environments" "Debian, Ubuntu: apt-get install python3-venv"
  [[ -w "$ROOT" ]] || jmp_die "cannot write to $ROOT"
  # --clear: what an interrupted run or a removed Python left there is of no use
  local options=(--clear)
  if [[ "${JMP_SYSTEM_SITE:-0}" != 0 ]]; then
    "$base" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)' ||
      jmp_die "JMP_SYSTEM_SITE=1, but $base is a virtual environment's: its packages cannot be shared" \
        "Name another JMP_PYTHON, or install into it: $base -m pip install -e '$ROOT[export-no-torch]'"
    options+=(--system-site-packages)
  fi
  jmp_step "$("$base" --version) -> .venv" "$base" -m venv "${options[@]}" "$VENV" || exit 2
}

jmp_sees_system() { # was .venv made with JMP_SYSTEM_SITE=1?
  grep -qi '^include-system-site-packages *= *true' "$VENV/pyvenv.cfg"
}

# Prints constraints for a machine that keeps what it has: torch and torchvision as they are, and
# the tested set only for what is not there yet.
jmp_constraints_around() {
  "$PYTHON" - "$1" <<'END'
import importlib.metadata as metadata
import re
import sys

def name_of(line):
    return re.match(r"[\w.-]*", line)[0].lower().replace("_", "-")

here = {name_of(found.metadata["Name"] or ""): found.version for found in metadata.distributions()}
pair = ("torch", "torchvision")
missing = [name for name in pair if name not in here]
if missing:
    sys.exit(f"no {' and no '.join(missing)}")
for name in pair:
    print(f"{name}=={here[name]}")
# A torch that brought CUDA packages says which toolkit goes with them.
cuda = any(name.startswith("nvidia-") for name in here)
for line in open(sys.argv[1], encoding="utf-8"):
    name = name_of(line)
    if name not in here and name not in pair and not (cuda and name.startswith(("cuda-", "nvidia-"))):
        print(line, end="")
END
}

# jmp_env EXTRA,EXTRA...: makes .venv and installs this checkout into it with these extras.
jmp_env() {
  local wanted="$1" stamp="$VENV/jmp_stamp" key have="" free tmp pins extras missing
  jmp_make_venv
  key="$("$PYTHON" - "$ROOT" <<'END'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
parts += [sys.version.encode(), str(root).encode()]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
END
)"
  [[ -f "$stamp" ]] && have="$(sed -n 2p "$stamp")"
  # all that is wanted and all that was there, so that two scripts do not undo each other's work
  wanted="$(printf '%s,%s' "$wanted" "$have" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd, -)"
  if [[ -f "$stamp" && "$(sed -n 1p "$stamp")" == "$key" && "$wanted" == "$have" ]]; then
    printf '  packages [%s] are installed\n' "$have"
    return
  fi
  pins="$ROOT/constraints.txt"
  extras="$wanted"
  if jmp_sees_system; then
    pins="$VENV/jmp_constraints.txt"
    missing="$(jmp_constraints_around "$ROOT/constraints.txt" 2>&1 >"$pins")" ||
      jmp_die "$(sed -n 's/^home = //p' "$VENV/pyvenv.cfg") has $missing, which JMP_SYSTEM_SITE=1 is to keep" \
        "Install both there, from one index, or leave JMP_SYSTEM_SITE out: rm -r '$VENV'"
    # before pip, which would only speak of a conflict
    "$PYTHON" "$ROOT/scripts/try_imports.py" torch || exit 2
    extras="$(tr ',' '\n' <<<"$wanted" | sed 's/^export$/export-no-torch/' | paste -sd, -)"
  elif [[ "$have" != *export* ]]; then
    free="$(jmp_free_gb "$ROOT")"
    ((free >= JMP_NEEDED_GB)) || [[ -d "$VENV/lib" && $(du -sk "$VENV" | cut -f1) -gt 5000000 ]] ||
      jmp_die "$free GB free in $ROOT, $JMP_NEEDED_GB are needed (PyTorch brings its CUDA libraries)" \
        "Make room there, or work in a checkout on a larger disk"
  fi
  # pip downloads into TMPDIR first; a small tmpfs there fills up with PyTorch's wheels
  tmp="${TMPDIR:-/tmp}"
  if (($(jmp_free_gb "$tmp") < 4)); then
    tmp="$VENV/tmp"
    mkdir -p "$tmp"
  fi
  rm -f "$stamp"
  TMPDIR="$tmp" jmp_step "packages [$wanted] (some GB: minutes)" \
    "$PYTHON" -m pip install --disable-pip-version-check -c "$pins" -e "$ROOT[$extras]" ||
    jmp_die "pip could not install the packages" \
      "No network? Not enough disk? Mend it and run this again: what was downloaded is kept." \
      "A conflict with constraints of your own (pip config list)? Lift them, or JMP_SYSTEM_SITE=1."
  "$PYTHON" "$ROOT/scripts/try_imports.py" "$wanted" || exit 2
  printf '%s\n%s\n' "$key" "$wanted" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}
