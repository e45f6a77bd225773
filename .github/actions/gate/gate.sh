#!/usr/bin/env bash
# What the action runs, its inputs in the environment. Comparing files needs Python 3.11 and nothing else.
set -uo pipefail
summary=$(mktemp)
options=(--threshold "$THRESHOLD" --markdown "$summary")
case $JUNIT in "") ;; /*) options+=(--junit "$JUNIT") ;; *) options+=(--junit "$PWD/$JUNIT") ;; esac
if [ -n "$CHECKOUT" ]; then
  for op in $OPS; do options+=(--op "$op"); done
  if cd "$CHECKOUT" && make --silent build; then
    .venv/bin/python -m bench gate --base "$BASE" --head "$HEAD" --seconds "$SECONDS_PER_OP" "${options[@]}"
    code=$?
  else
    echo "::error::$CHECKOUT cannot be built" >&2
    code=2
  fi
else
  shopt -s nullglob
  # shellcheck disable=SC2206 # globs are meant to expand
  base=($BASE) head=($HEAD) files=()
  if [ ${#base[@]} -eq 0 ] || [ ${#base[@]} -ne ${#head[@]} ]; then
    echo "::error::base matches ${#base[@]} files and head ${#head[@]}, expected as many of both, at least 1" >&2
    code=2
  else
    for i in "${!base[@]}"; do
      echo "pair: ${base[i]} ${head[i]}"
      files+=("${base[i]}" "${head[i]}")
    done
    # -P: the project's own folder "bench" must not be taken for ours.
    PYTHONPATH=$LIBRARY python3 -P -m bench compare "${files[@]}" "${options[@]}"
    code=$?
  fi
fi
# Python ends with 1 for want of anything; slower is what a judgement says.
if [ "$code" -ne 0 ] && ! [ -s "$summary" ]; then code=2; fi
case $code in 0) verdict=pass ;; 1) verdict=slower ;; *) verdict=unknown ;; esac
echo "verdict=$verdict" >>"$GITHUB_OUTPUT"
cat "$summary" >>"$GITHUB_STEP_SUMMARY"
# Ambiguous only where there was a judgement: a file that cannot be read never passes.
if [ "$code" -eq 2 ] && [ "$ALLOW_AMBIGUOUS" = true ] && [ -s "$summary" ]; then code=0; fi
exit "$code"
