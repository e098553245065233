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
    if ! "${@:3}" 2>&1 | tee "$out/logs/$name.log"; then
        echo "error: stage $name failed; see $out/logs/$name.log, and give the same command to continue from here"
        exit 1
    fi
    echo "$name $((SECONDS - began))" >> "$out/logs/seconds.txt"
}
