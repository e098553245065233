# What the recipes share; each sources it once it has set $out, and $dry where stages are to be printed only.

stage() {  # NAME RESULT COMMAND...: once, and named when it fails
    local name=$1 result=$2
    if [[ -e $result ]]; then
        echo "== $name: skipped, $result is there"
        return
    fi
    echo "== $name"
    if [[ -n ${dry:-} ]]; then
        printf '%q ' "${@:3}"
        echo
        return
    fi
    local began=$SECONDS
    if ! "${@:3}" 2>&1 | tee "$out/logs/$name.log" | told "$name"; then
        echo "error: stage $name failed; see $out/logs/$name.log, and give the same command to continue from here"
        exit 1
    fi
    echo "$name $((SECONDS - began))" >> "$out/logs/seconds.txt"
}

told() {  # NAME: what a stage says; led by its name where others talk at the same time
    if [[ ${jobs:-1} == 1 ]]; then cat; else sed -u "s/^/$1: /"; fi
}

each() {  # FUNCTION NAMES...: the function for every name, $jobs of them at a time
    local name failed= pids=()
    for name in "${@:2}"; do
        if [[ ${jobs:-1} == 1 || -n ${dry:-} ]]; then
            "$1" "$name"
            continue
        fi
        while (($(jobs -rp | wc -l) >= jobs)); do sleep 0.2; done
        "$1" "$name" &
        pids+=($!)
    done
    for name in "${pids[@]}"; do wait "$name" || failed=yes; done
    if [[ -n $failed ]]; then exit 1; fi
}
