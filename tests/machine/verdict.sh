# shellcheck shell=bash
# Checks, one line each as a test harness prints them, and their sum. Sourced.

passed=0 failed=0
verdict() { # name ok|FAILED
    printf 'test %s ... %s\n' "$1" "$2"
    if [[ $2 == ok ]]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}

check() { # name command...
    local name=$1
    shift
    if "$@"; then verdict "$name" ok; else verdict "$name" FAILED; fi
}

# Whether a process ends in that many seconds.
ended() { # pid seconds
    local deadline=$((SECONDS + $2))
    while kill -0 "$1" 2>/dev/null; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

# The last line, and whether all passed.
sum_up() {
    echo "test result: $( ((failed)) && echo FAILED || echo ok). $passed passed; $failed failed; 0 ignored"
    ((failed == 0 && passed > 0))
}
