# usage: sh THIS_FILE student.gguf [llama-bench] > result.txt
#
# Runs llama.cpp's llama-bench on a GGUF file on this board, watches the board meanwhile, and prints what it found for
# `autodistill measure --result`. Needs a POSIX shell, awk and llama-bench; installs nothing, writes to a folder of its
# own under ${TMPDIR:-/tmp} and removes it.
LC_ALL=C
export LC_ALL
model=${1:-}
bench=${2:-}
tmp=
say() { printf '%s=%s\n' "$1" "$2"; }
finish() {
    say error "$1"
    say end failed
    [ -n "$tmp" ] && rm -rf "$tmp"
    exit 1
}
say autodistill-bench 1
say student "$student"
[ -n "$model" ] && [ -f "$model" ] || finish "there is no file '$model': give the student as the first argument"
size=$(wc -c < "$model" | tr -d ' ')
[ "$size" = "$student_bytes" ] || finish "'$model' has $size bytes and not $student_bytes: copy it again"
for found in "$bench" "$(command -v llama-bench 2>/dev/null)" "$HOME/llama.cpp/build/bin/llama-bench" \
    "$HOME/llama.cpp/llama-bench" /usr/local/bin/llama-bench /opt/llama.cpp/build/bin/llama-bench; do
    if [ -n "$found" ]; then
        if [ -f "$found" ] && [ -x "$found" ]; then bench=$found; break; fi
        [ "$found" = "$bench" ] && finish "there is no program '$bench': give the path of llama-bench"
    fi
    bench=
done
[ -n "$bench" ] || finish "llama-bench is not there: build llama.cpp on the board, or give the path of llama-bench"
tmp=$(mktemp -d "${TMPDIR:-/tmp}/autodistill.XXXXXX") || finish "no folder can be made in ${TMPDIR:-/tmp}"
child=
trap 'if [ -n "$child" ]; then kill "$child"; fi; rm -rf "$tmp"; exit 1' INT TERM HUP
first() { for file in "$@"; do if [ -r "$file" ]; then tr -d '\000' < "$file"; return; fi; done; }
machine=$(first /proc/device-tree/model)
[ -n "$machine" ] || machine=$(awk -F': ' '/^model name/ { print $2; exit }' /proc/cpuinfo 2>/dev/null)
say machine "${machine:-$(uname -m)}"
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
[ "$threads" = 0 ] && threads=$cores
say cores "$cores"
say threads "$threads"
say memory_kb "$(awk '/^MemTotal/ { print $2 }' /proc/meminfo 2>/dev/null)"
say system "$(uname -srm)"
say load_average "$(cut -d' ' -f1 /proc/loadavg 2>/dev/null)"
mode=$(nvpmodel -q 2>/dev/null | awk -F': ' '/NV Power Mode/ { print $2; exit }')
[ -n "$mode" ] || mode=$(first /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor)
say power_mode "$mode"

# Of the sensors that there are: the hottest zone, the largest power rail (an input rail feeds the others). A Jetson AGX
# Orin has no rail of its input: there three rails side by side make it up.
hottest() {
    { cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null
      vcgencmd measure_temp 2>/dev/null | awk -F"[='.]" '{ print $2 * 1000 }'; } |
        awk '$1 > 0 && $1 < 200000 && $1 > most { most = $1 } END { if (most) print most }'
}
power() {
    {
        for hwmon in /sys/class/hwmon/hwmon*; do
            cat "$hwmon"/power*_input 2>/dev/null
            for volts in "$hwmon"/in[0-9]*_input; do
                amps=${volts%/*}/curr${volts##*/in}
                [ -r "$volts" ] && [ -r "$amps" ] &&
                    echo $(($(cat "$volts") * $(cat "$amps"))) "$(cat "${volts%_input}_label" 2>/dev/null)"
            done
        done
        vcgencmd pmic_read_adc 2>/dev/null | awk -F'[ =()]+' '
            /_A current/ { name = $2; sub(/_A$/, "", name); amps[name] = $5 + 0 }
            /_V volt/ { name = $2; sub(/_V$/, "", name); volts[name] = $5 + 0 }
            END { for (name in amps) watts += amps[name] * volts[name]; if (watts) printf "%d\n", watts * 1000000 }'
        if command -v tegrastats > /dev/null 2>&1 && command -v timeout > /dev/null 2>&1; then
            timeout 2 tegrastats --interval 500 2>/dev/null | head -n 1 |
                awk '{ for (place = 1; place < NF; place++)
                    if ($place ~ /^(VDD_IN|POM_5V_IN|VDD_GPU_SOC|VDD_CPU_CV|VIN_SYS_5V0)$/)
                        print ($(place + 1) + 0) * 1000, $place }'
        fi
    } | awk '$2 ~ /^(VDD_GPU_SOC|VDD_CPU_CV|VIN_SYS_5V0)$/ { if ($1 > side[$2]) side[$2] = $1; next }
        $1 > 0 && $1 > most { most = $1 }
        END { for (rail in side) sum += side[rail]; if (sum > most) most = sum; if (most) printf "%.0f\n", most }'
}
# Energy of whole packages in microjoules, where the kernel counts it and lets us read it; psys has the packages in it.
energy() {
    for zone in /sys/class/powercap/intel-rapl:[0-9]; do
        [ "$(cat "$zone/name" 2>/dev/null)" = psys ] || cat "$zone/energy_uj" 2>/dev/null
    done | awk '{ sum += $1 } END { if (NR) printf "%.0f", sum }'
}
# What slows the board down: a Raspberry Pi's firmware knows, elsewhere states of cooling, of which a fan slows nothing.
throttled() {
    vcgencmd get_throttled 2>/dev/null && return
    {
        for cooling in /sys/class/thermal/cooling_device*; do
            case $(cat "$cooling/type" 2>/dev/null) in *[Ff]an* | *FAN*) ;; *) cat "$cooling/cur_state" ;; esac
        done
        cat /sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count
    } 2>/dev/null | awk '{ sum += $1 } END { if (NR) print sum }'
}
seconds() { cut -d' ' -f1 /proc/uptime 2>/dev/null || date +%s; }

# Runs llama-bench once; $1 is what the run is called, the rest are its arguments.
run() {
    name=$1
    shift
    : > "$tmp/watched"
    say "$name.throttled_before" "$(throttled | tr '\n' ' ')"
    say "$name.energy_before_uj" "$(energy)"
    say "$name.began" "$(seconds)"
    "$bench" -m "$model" -o json -r "$repetitions" -t "$threads" -ctk "$cache_k" -ctv "$cache_v" ${flash:+-fa "$flash"} \
        "$@" > "$tmp/out" 2> "$tmp/err" &
    child=$!
    peak=0
    meanwhile=' '
    # A process that has ended but was not waited for is still there, as a zombie.
    while state=$(awk '/^State/ { print $2 }' "/proc/$child/status" 2>/dev/null) && [ -n "$state" ] && [ "$state" != Z ]; do
        now=$(awk '/^VmHWM/ { print $2 }' "/proc/$child/status" 2>/dev/null)
        [ "${now:-0}" -gt "$peak" ] && peak=$now
        # What there is no sensor for is 0, so that the other stays in its place.
        heat=$(hottest)
        rails=$(power)
        echo "${heat:-0} ${rails:-0}" >> "$tmp/watched"
        # Each value once: most are as they were.
        now=$(throttled | tr '\n' ' ')
        case $meanwhile in *" ${now% } "*) ;; *) meanwhile="$meanwhile${now% } " ;; esac
        sleep 0.2 2>/dev/null || sleep 1  # whole seconds are all that POSIX promises
    done
    wait "$child"
    code=$?
    child=
    say "$name.ended" "$(seconds)"
    say "$name.energy_after_uj" "$(energy)"
    say "$name.throttled_after" "$(throttled | tr '\n' ' ')"
    say "$name.throttled_meanwhile" "$meanwhile"
    [ "$code" = 0 ] || finish "llama-bench ended with $code: $(grep . "$tmp/err" | tail -n 1)"
    say "$name.peak_kb" "$peak"
    say "$name.temperature_mc" "$(awk '$1 > most { most = $1 } END { print most }' "$tmp/watched")"
    say "$name.power_uw" "$(awk '$2 > 0 { sum += $2; n += 1 } END { if (n) printf "%.0f", sum / n }' "$tmp/watched")"
    echo "$name.json"
    cat "$tmp/out"
    echo
    echo "$name.json-end"
}
run prompt -p "$prompt" -n 0
run decode -p 0 -n "$decoded"
say end ok
rm -rf "$tmp"
