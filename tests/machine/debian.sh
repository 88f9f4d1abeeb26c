# shellcheck shell=bash
# Debian's kernel and an initramfs of this machine's programs, for a QEMU that emulates everything.
# Sourced by the lanes beside this folder, which have `note` and `die`, and `root`, the tree's root.
#
# In come a kernel package or the wish for one, programs, files and names of modules. Out come
# `vmlinuz`, `release`, and an initramfs: everything at the path that it has here, /bin/busybox, and
# /lib/modules/load, which lists the modules in the order in which to load them.

# Downloaded once for all lanes, and never installed.
debian_cache=${DEBIAN_KERNEL_DIR:-$root/target/debian-kernel}

# need_programs PROGRAM:PACKAGE...: all of them, and a static busybox, are there, or it ends here.
need_programs() {
    local entry missing=()
    for entry in "$@"; do
        command -v "${entry%%:*}" >/dev/null || missing+=("${entry#*:}")
    done
    busybox=$(command -v busybox || true)
    if [[ -z $busybox ]] || ldd "$busybox" >/dev/null 2>&1; then
        missing+=(busybox-static)
    fi
    ((${#missing[@]} == 0)) || die "missing: ${missing[*]}. On Debian: apt-get install ${missing[*]}"
}

# fetch_kernel [DEB]: sets `vmlinuz`, `release` and `module_dir`; without DEB, to Debian's newest.
fetch_kernel() {
    local deb=${1:-} package dir
    mkdir -p "$debian_cache/deb"
    [[ -n $deb ]] || deb=$(newest_deb)
    if [[ -z $deb ]]; then
        command -v apt-get >/dev/null ||
            die "no apt-get here: put a Debian linux-image-*-amd64 .deb into $debian_cache/deb, or give --kernel"
        package=$(apt-cache depends linux-image-amd64 2>/dev/null |
            awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
        [[ -n $package ]] ||
            die "apt knows no linux-image-amd64 (run apt-get update?), and no kernel .deb was given with --kernel"
        note "downloading $package"
        (cd "$debian_cache/deb" && apt-get -qq -o APT::Sandbox::User=root download "$package") ||
            die "apt-get download $package failed (run apt-get update?)"
        deb=$(newest_deb)
    fi
    [[ -s $deb ]] || die "no kernel package at '$deb'"
    dir=$debian_cache/kernel/$(basename "$deb" .deb)
    if [[ ! -e $dir/.complete ]]; then
        rm -rf "$dir"
        mkdir -p "$dir"
        dpkg-deb -x "$deb" "$dir" || die "cannot unpack $deb"
        touch "$dir/.complete"
    fi
    vmlinuz=$(find "$dir/boot" -name 'vmlinuz-*' | head -n 1)
    [[ -n $vmlinuz ]] || die "$deb holds no boot/vmlinuz-*"
    release=${vmlinuz##*/vmlinuz-}
    module_dir=$dir/lib/modules/$release
    [[ -d $module_dir ]] || module_dir=$dir/usr/lib/modules/$release
    [[ -d $module_dir ]] || die "$deb holds no lib/modules/$release"
}

newest_deb() {
    find "$debian_cache/deb" -maxdepth 1 -name 'linux-image-*_amd64.deb' | sort -V | tail -n 1
}

# new_stage DIR INIT: DIR becomes the root of an initramfs whose first process is INIT.
new_stage() {
    stage=$1
    declare -gA loaded=()
    mkdir -p "$stage"/{bin,lib/modules,dev}
    cp "$busybox" "$stage/bin/busybox"
    cp "$2" "$stage/init"
    chmod 755 "$stage/init" "$stage/bin/busybox"
    : >"$stage/lib/modules/load"
}

# copy_in PATH: kept, so that paths compiled into programs go on working.
copy_in() {
    local at=$stage$1
    [[ ! -e $at ]] || return 0
    mkdir -p "$(dirname "$at")"
    cp -L "$1" "$at"
    chmod u+w "$at"
}

# copy_program PATH: without debug information, with its libraries.
copy_program() {
    [[ ! -e $stage$1 ]] || return 0
    copy_in "$1"
    strip --strip-debug "$stage$1" 2>/dev/null || true
    local library
    while read -r library; do
        copy_in "$library"
    done < <(ldd "$1" 2>/dev/null | awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^\//) print $i }')
}

# add_module NAME: what it needs comes before it. The package has no modules.dep (its post-install
# step makes that), so the needs come from the modules themselves.
add_module() {
    local name=${1//-/_} file pattern dependency flat
    [[ -z ${loaded[$name]:-} ]] || return 0
    loaded[$name]=1
    # Built into the kernel: nothing to load.
    grep -qsE "/${name//_/[-_]}\.ko$" "$module_dir/modules.builtin" && return 0
    pattern=${name//_/[-_]}.ko
    file=$(find "$module_dir" \
        \( -name "$pattern" -o -name "$pattern.xz" -o -name "$pattern.zst" -o -name "$pattern.gz" \) |
        head -n 1)
    [[ -n $file ]] || die "the kernel package has no module $name"
    flat=$stage/lib/modules/$name.ko
    case $file in
    *.xz) xz -dc "$file" >"$flat" ;;
    *.zst) zstd -qdc "$file" >"$flat" ;;
    *.gz) gzip -dc "$file" >"$flat" ;;
    *) cp "$file" "$flat" ;;
    esac || die "cannot unpack the module $file"
    for dependency in $(tr '\0' '\n' <"$flat" | sed -n 's/^depends=//p' | tr ',' ' '); do
        add_module "$dependency"
    done
    echo "/lib/modules/$name.ko" >>"$stage/lib/modules/load"
}

# pack_stage FILE: the stage as an initramfs.
pack_stage() {
    (cd "$stage" && find . -print0 | cpio -0 -o -H newc -R 0:0 --quiet) >"$1"
}
