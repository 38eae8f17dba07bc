// IEEE half precision as bits, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half h) {
    const int sign = h.bits >> 15, exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
    if (exponent == 31) return mantissa ? NAN : sign ? -INFINITY : INFINITY;
    const float magnitude = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -magnitude : magnitude;
}

inline __half __float2half_rn(float v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const float magnitude = std::fabs(v);
    if (std::isnan(v)) return {0x7fff};
    if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent = 0;
    std::frexp(magnitude, &exponent);                                     // magnitude = m * 2^exponent, 0.5 <= m < 1
    const int step = (magnitude == 0 || exponent < -13 ? -13 : exponent) - 11;  // of the last bit
    const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -step)));
    return {static_cast<uint16_t>(sign + ((step + 24) << 10) + units)};   // The implicit bit of a normal number is added to the exponent.
}
