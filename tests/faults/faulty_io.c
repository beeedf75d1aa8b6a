/* Stands between a process and libc (LD_PRELOAD): counts the system calls that touch one folder, and lets one of them
 * kill the process, fail, fall short or lie. Nothing happens before faulty_arm, which a forked child calls.
 *
 * Calls that go past libc (safetensors renames its file that way) or that it makes by itself (the close of a directory
 * stream) are not seen.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum call { OPENAT, WRITE, FSYNC, CLOSE, LINK, UNLINK, MKDIR, RENAME, NUM_CALLS };
enum action { NOTHING, KILL, FAIL, FAIL_FROM_HERE, SHORT, LIE_NOTHING, LIE_HALF, LIE_ZEROS, LIE_BIT };

#define MAX_FDS 65536

static struct {
    atomic_long counts[NUM_CALLS];
    atomic_int fired;
    char path[4096];
} *shared; /* with the process that forks */
static char folder[4096];
static size_t folder_length;
static int chosen_call = -1, chosen_action, chosen_errno;
static long chosen_number;
static bool is_armed;
static bool is_ours[MAX_FDS];

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

void faulty_prepare(void) {
    if (shared == NULL)
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memset(shared, 0, sizeof *shared);
}

void faulty_arm(const char *path, int call, long number, int action, int error) {
    snprintf(folder, sizeof folder, "%s", path);
    folder_length = strlen(folder);
    chosen_call = call;
    chosen_number = number;
    chosen_action = action;
    chosen_errno = error;
    is_armed = true;
}

long faulty_count(int call) { return shared->counts[call]; }

const char *faulty_path(void) { return shared->fired ? shared->path : ""; }

static bool is_inside(int directory, const char *path) {
    if (!is_armed || path == NULL)
        return false;
    if (path[0] == '/')
        return strncmp(path, folder, folder_length) == 0 && (path[folder_length] == '/' || path[folder_length] == 0);
    return directory >= 0 && directory < MAX_FDS && is_ours[directory];
}

static bool is_inside_fd(int fd) { return is_armed && fd >= 0 && fd < MAX_FDS && is_ours[fd]; }

/* Count a call, and do what is to be done at it. */
static enum action strike(enum call call, const char *path, int fd) {
    long number = atomic_fetch_add(&shared->counts[call], 1) + 1;
    bool later = chosen_action == FAIL_FROM_HERE && number > chosen_number;
    if (call != (enum call)chosen_call || (number != chosen_number && !later))
        return NOTHING;
    if (!atomic_exchange(&shared->fired, 1)) {
        char link[64];
        ssize_t length = -1;
        if (path != NULL) {
            snprintf(shared->path, sizeof shared->path, "%s", path);
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
            length = readlink(link, shared->path, sizeof shared->path - 1);
            shared->path[length < 0 ? 0 : length] = 0;
        }
    }
    if (chosen_action == KILL)
        for (;;)
            kill(getpid(), SIGKILL);
    return chosen_action;
}

static bool fails(enum call call, int directory, const char *path) {
    if (!is_inside(directory, path))
        return false;
    enum action action = strike(call, path, -1);
    if (action != FAIL && action != FAIL_FROM_HERE)
        return false;
    errno = chosen_errno;
    return true;
}

static bool fd_fails(enum call call, int fd) {
    if (!is_inside_fd(fd))
        return false;
    enum action action = strike(call, NULL, fd);
    if (action != FAIL && action != FAIL_FROM_HERE)
        return false;
    errno = chosen_errno;
    return true;
}

/* open */

static int opened(int fd, bool inside) {
    if (is_armed && fd >= 0 && fd < MAX_FDS)
        is_ours[fd] = inside;
    return fd;
}

#define MODE(flags, last)                                                                                              \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                                                           \
        va_list arguments;                                                                                             \
        va_start(arguments, last);                                                                                     \
        mode = va_arg(arguments, mode_t);                                                                              \
        va_end(arguments);                                                                                             \
    }

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        MODE(flags, flags)                                                                                             \
        if (fails(OPENAT, AT_FDCWD, path))                                                                             \
            return -1;                                                                                                 \
        return opened(REAL(name)(path, flags, mode), is_inside(AT_FDCWD, path));                                       \
    }
#define OPEN_AT(name)                                                                                                   \
    int name(int directory, const char *path, int flags, ...) {                                                        \
        MODE(flags, flags)                                                                                             \
        if (fails(OPENAT, directory, path))                                                                            \
            return -1;                                                                                                 \
        return opened(REAL(name)(directory, path, flags, mode), is_inside(directory, path));                           \
    }
OPEN(open)
OPEN(open64)
OPEN_AT(openat)
OPEN_AT(openat64)

/* What a fortified program calls where it gives no mode. */
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int directory, const char *path, int flags) { return openat(directory, path, flags); }
int __openat64_2(int directory, const char *path, int flags) { return openat64(directory, path, flags); }

#define FOPEN(name)                                                                                                    \
    FILE *name(const char *restrict path, const char *restrict mode) {                                                 \
        return fails(OPENAT, AT_FDCWD, path) ? NULL : REAL(name)(path, mode);                                          \
    }
FOPEN(fopen)
FOPEN(fopen64)

DIR *opendir(const char *path) { return fails(OPENAT, AT_FDCWD, path) ? NULL : REAL(opendir)(path); }

int close(int fd) {
    bool is_failing = fd_fails(CLOSE, fd);
    if (is_armed && fd >= 0 && fd < MAX_FDS)
        is_ours[fd] = false;
    int result = REAL(close)(fd); /* the kernel closes it even where it reports an error */
    if (!is_failing)
        return result;
    errno = chosen_errno;
    return -1;
}

/* write: everything that changes a file's bytes */

/* Write `size` bytes, or do what `action` says in their place. An offset of -1: at the file's position. */
static ssize_t written(int fd, const void *data, size_t size, off_t offset, enum action action) {
    char *other = NULL;
    size_t real_size = size;
    if (action == FAIL || action == FAIL_FROM_HERE) {
        errno = chosen_errno;
        return -1;
    }
    if (action == SHORT || action == LIE_HALF)
        real_size = size > 1 ? size / 2 : size;
    else if (action == LIE_NOTHING)
        return size;
    else if ((action == LIE_ZEROS || action == LIE_BIT) && size > 0) {
        other = calloc(1, size);
        if (action == LIE_BIT) {
            memcpy(other, data, size);
            other[size / 2] ^= 0x10;
        }
        data = other;
    }
    ssize_t result = offset < 0 ? REAL(write)(fd, data, real_size) : REAL(pwrite)(fd, data, real_size, offset);
    free(other);
    return action == LIE_HALF && result >= 0 ? (ssize_t)size : result;
}

ssize_t write(int fd, const void *data, size_t size) {
    if (!is_inside_fd(fd))
        return REAL(write)(fd, data, size);
    return written(fd, data, size, -1, strike(WRITE, NULL, fd));
}

#define PWRITE(name)                                                                                                   \
    ssize_t name(int fd, const void *data, size_t size, off_t offset) {                                                \
        if (!is_inside_fd(fd))                                                                                         \
            return REAL(name)(fd, data, size, offset);                                                                 \
        return written(fd, data, size, offset, strike(WRITE, NULL, fd));                                               \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (!is_inside_fd(fd))
        return REAL(writev)(fd, parts, count);
    size_t size = 0;
    for (int part = 0; part < count; part++)
        size += parts[part].iov_len;
    char *data = malloc(size + 1), *end = data;
    for (int part = 0; part < count; part++)
        end = mempcpy(end, parts[part].iov_base, parts[part].iov_len);
    ssize_t result = written(fd, data, size, -1, strike(WRITE, NULL, fd));
    free(data);
    return result;
}

/* A copy inside the kernel, made by hand so that it can be interfered with. */
static ssize_t copied(int target, int source, off_t *offset, size_t size) {
    enum action action = strike(WRITE, NULL, target);
    if (size > 1 << 20)
        size = 1 << 20;
    char *data = malloc(size + 1);
    ssize_t got = offset ? pread(source, data, size, *offset) : read(source, data, size);
    ssize_t result = got <= 0 ? got : written(target, data, got, -1, action);
    if (got > 0 && result >= 0) {
        if (offset)
            *offset += result;
        else
            lseek(source, result - got, SEEK_CUR);
    }
    free(data);
    return result;
}

#define SENDFILE(name)                                                                                                 \
    ssize_t name(int target, int source, off_t *offset, size_t size) {                                                 \
        if (!is_inside_fd(target))                                                                                     \
            return REAL(name)(target, source, offset, size);                                                           \
        return copied(target, source, offset, size);                                                                   \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)

ssize_t copy_file_range(int source, off_t *from, int target, off_t *to, size_t size, unsigned flags) {
    if (!is_inside_fd(target))
        return REAL(copy_file_range)(source, from, target, to, size, flags);
    if (to != NULL) {
        errno = EOPNOTSUPP; /* callers fall back to plain writes */
        return -1;
    }
    return copied(target, source, from, size);
}

#define FTRUNCATE(name)                                                                                                \
    int name(int fd, off_t size) {                                                                                     \
        if (!is_inside_fd(fd))                                                                                         \
            return REAL(name)(fd, size);                                                                               \
        enum action action = strike(WRITE, NULL, fd);                                                                  \
        if (action == FAIL || action == FAIL_FROM_HERE) {                                                              \
            errno = chosen_errno;                                                                                      \
            return -1;                                                                                                 \
        }                                                                                                              \
        return action >= LIE_NOTHING ? 0 : REAL(name)(fd, size);                                                       \
    }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)

int fsync(int fd) { return fd_fails(FSYNC, fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fd_fails(FSYNC, fd) ? -1 : REAL(fdatasync)(fd); }

/* names */

int link(const char *from, const char *to) { return fails(LINK, AT_FDCWD, to) ? -1 : REAL(link)(from, to); }
int linkat(int from_directory, const char *from, int directory, const char *to, int flags) {
    return fails(LINK, directory, to) ? -1 : REAL(linkat)(from_directory, from, directory, to, flags);
}
int unlink(const char *path) { return fails(UNLINK, AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int unlinkat(int directory, const char *path, int flags) {
    return fails(UNLINK, directory, path) ? -1 : REAL(unlinkat)(directory, path, flags);
}
int rmdir(const char *path) { return fails(UNLINK, AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }
int remove(const char *path) { return fails(UNLINK, AT_FDCWD, path) ? -1 : REAL(remove)(path); }
int mkdir(const char *path, mode_t mode) { return fails(MKDIR, AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int directory, const char *path, mode_t mode) {
    return fails(MKDIR, directory, path) ? -1 : REAL(mkdirat)(directory, path, mode);
}
int rename(const char *from, const char *to) { return fails(RENAME, AT_FDCWD, to) ? -1 : REAL(rename)(from, to); }
int renameat(int from_directory, const char *from, int directory, const char *to) {
    return fails(RENAME, directory, to) ? -1 : REAL(renameat)(from_directory, from, directory, to);
}
int renameat2(int from_directory, const char *from, int directory, const char *to, unsigned flags) {
    return fails(RENAME, directory, to) ? -1 : REAL(renameat2)(from_directory, from, directory, to, flags);
}
