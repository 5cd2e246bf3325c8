# shellcheck shell=sh
# Functions that write a cpio archive (newc) to stdout, member by member, the same
# bytes for the same input and without privilege. To be sourced.

newc_inode=0

# newc_member MODE LINKS SIZE NAME: a header; the content is the caller's.
newc_member() {
    newc_inode=$((newc_inode + 1))
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\0' \
        "$newc_inode" "$1" 0 0 "$2" 0 "$3" 0 0 0 0 $((${#4} + 1)) 0 "$4"
    newc_pad $((110 + ${#4} + 1))
}

# newc_pad LENGTH: zeros up to the next multiple of four.
newc_pad() { head -c $(((4 - $1 % 4) % 4)) /dev/zero; }

# newc_folder NAME
newc_folder() { newc_member $((0040755)) 2 0 "$1"; }

# newc_file NAME FROM: an executable file with FROM's content.
newc_file() {
    newc_size=$(wc -c <"$2")
    newc_member $((0100755)) 1 "$newc_size" "$1"
    cat "$2"
    newc_pad "$newc_size"
}

# newc_device NAME MAJOR MINOR: a character device for everyone.
newc_device() {
    newc_inode=$((newc_inode + 1))
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\0' \
        "$newc_inode" $((0020666)) 0 0 1 0 0 0 0 "$2" "$3" $((${#1} + 1)) 0 "$1"
    newc_pad $((110 + ${#1} + 1))
}

newc_end() {
    newc_inode=-1
    newc_member 0 1 0 'TRAILER!!!'
}
