// Leave to use AMX, which Linux gives to processes that ask.

#include "tiles.h"

#ifdef HAVE_TILES

#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

EXPORT int tgis_amx(const void *unused) {
  static int allowed = -1;
  (void)unused;
  if (allowed < 0)
    allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return allowed;
}

#else

EXPORT int tgis_amx(const void *unused) {
  (void)unused;
  return 0;
}

#endif
