# Which nvcc builds the CUDA kernels, and for which GPUs; or what is in the way.
#
# Each function sets OBSTACLE in its caller: empty, or the reason and the remedy.

set(COVR_OLDEST_CUDA 12.0)  # the first nvcc with C++20

# Ampere and Ada, Hopper, Blackwell in data centres, Blackwell on desks.
set(COVR_WANTED_ARCHITECTURES 80 90 100 120)

# The compiler that CMake takes: the one configured before, $CUDACXX, or nvcc on PATH.
function(covr_find_nvcc NVCC OBSTACLE)
  if(CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(NOT "$ENV{CUDACXX}" STREQUAL "")
    get_filename_component(nvcc "$ENV{CUDACXX}" PROGRAM)
  else()
    find_program(nvcc nvcc PATHS "$ENV{CUDA_PATH}/bin" NO_CACHE)
  endif()
  set(${NVCC} "${nvcc}" PARENT_SCOPE)
  set(${OBSTACLE} "" PARENT_SCOPE)
  if(NOT nvcc OR NOT EXISTS "${nvcc}")
    set(${OBSTACLE} "no CUDA compiler was found: put nvcc on PATH (or set CUDACXX)" PARENT_SCOPE)
  endif()
endfunction()

function(covr_check_release NVCC OBSTACLE)
  set(${OBSTACLE} "" PARENT_SCOPE)
  execute_process(COMMAND "${NVCC}" --version OUTPUT_VARIABLE version ERROR_VARIABLE version)
  if(NOT version MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${OBSTACLE} "${NVCC} --version names no CUDA release: set CUDACXX to an nvcc" PARENT_SCOPE)
  elseif(CMAKE_MATCH_1 VERSION_LESS COVR_OLDEST_CUDA)
    set(${OBSTACLE} "${NVCC} is of CUDA ${CMAKE_MATCH_1}, and ${COVR_OLDEST_CUDA} is the oldest supported: \
set CUDACXX to a newer nvcc" PARENT_SCOPE)
  endif()
endfunction()

# Those of COVR_WANTED_ARCHITECTURES that this nvcc knows, in CMake's syntax. The newest of them as PTX too, which
# drivers compile for GPUs that came later.
function(covr_choose_architectures NVCC ARCHITECTURES OBSTACLE)
  execute_process(COMMAND "${NVCC}" --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
  string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
  set(older "")
  set(newest "")
  foreach(architecture IN LISTS COVR_WANTED_ARCHITECTURES)
    if("sm_${architecture}" IN_LIST known)
      if(newest)
        list(APPEND older ${newest}-real)
      endif()
      set(newest ${architecture})
    endif()
  endforeach()
  set(${ARCHITECTURES} ${older} ${newest} PARENT_SCOPE)
  set(${OBSTACLE} "" PARENT_SCOPE)
  if(NOT newest)
    list(JOIN COVR_WANTED_ARCHITECTURES ", " wanted)
    set(${OBSTACLE} "${NVCC} compiles for none of ${wanted}: name others with COVR_CUDA_ARCHITECTURES"
      PARENT_SCOPE)
  endif()
endfunction()

# Whether CMake can compile with this nvcc. The most frequent reason against it is a C++ compiler that is too new for it.
function(covr_try_nvcc NVCC OBSTACLE)
  set(${OBSTACLE} "" PARENT_SCOPE)
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # check_language() would not repeat a check that failed
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    return()
  endif()
  # CMake keeps what the compiler said to itself.
  set(source "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/trial.cu")
  file(WRITE "${source}" "int main() {}\n")
  set(host "")
  if(NOT "$ENV{CUDAHOSTCXX}" STREQUAL "")
    set(host "-ccbin=$ENV{CUDAHOSTCXX}")
  endif()
  execute_process(COMMAND "${NVCC}" ${host} -c "${source}" -o "${source}.o"
    OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE status)
  if(said MATCHES "([^\n]*error[^\n]*)")
    string(STRIP "${CMAKE_MATCH_1}" said)
  elseif(status EQUAL 0)
    set(said "see CMakeFiles/CMakeConfigureLog.yaml")
  else()
    set(said "it ends with ${status}")
  endif()
  set(${OBSTACLE} "${NVCC} cannot compile here (${said}): if it refuses this C++ compiler, name another one with \
CUDAHOSTCXX" PARENT_SCOPE)
endfunction()

# All of the above. ARCHITECTURES are those that the user gave, or chosen; enable_language(CUDA) is the caller's, since
# it works in no function.
function(covr_find_cuda ARCHITECTURES OBSTACLE)
  set(architectures "")
  covr_find_nvcc(nvcc obstacle)
  if(NOT obstacle)
    covr_check_release("${nvcc}" obstacle)
  endif()
  if(NOT obstacle)
    if(DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(architectures "${CMAKE_CUDA_ARCHITECTURES}")
    elseif(NOT "$ENV{CUDAARCHS}" STREQUAL "")
      set(architectures "$ENV{CUDAARCHS}")
    else()
      covr_choose_architectures("${nvcc}" architectures obstacle)
    endif()
  endif()
  if(NOT obstacle)
    covr_try_nvcc("${nvcc}" obstacle)
  endif()
  set(${ARCHITECTURES} "${architectures}" PARENT_SCOPE)
  set(${OBSTACLE} "${obstacle}" PARENT_SCOPE)
endfunction()

# Architectures as a compiler definition can hold them, "80-real,90"; CMake's names for groups are resolved.
function(covr_list_architectures OUT)
  set(built "${CMAKE_CUDA_ARCHITECTURES}")
  string(TOUPPER "${built}" group)
  string(REPLACE "-" "_" group "${group}")
  if(group MATCHES "^(NATIVE|ALL|ALL_MAJOR)$")
    set(built "${CMAKE_CUDA_ARCHITECTURES_${group}}")
  endif()
  if(NOT built MATCHES "^[0-9]")  # native, where there is no GPU
    message(FATAL_ERROR "COVR_CUDA_ARCHITECTURES=${CMAKE_CUDA_ARCHITECTURES} names no architecture here: give \
numbers, such as 80 for an A100 or 90 for an H100")
  endif()
  string(REPLACE ";" "," built "${built}")
  set(${OUT} "${built}" PARENT_SCOPE)
endfunction()
